"""What a backend is: a name, the reason it cannot run here if there is one, and its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdcore.backends.call import Call

Gradients = dict[str, Tensor]  # by tensor name, without the "?"


def always(call: Any) -> None:
    """No objection."""
    return None


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records inside, also within a torch operator, where the dispatcher has left it behind."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield


@dataclass(frozen=True)
class Implementation:
    """One operator of one backend.

    Args:
        forward: ``forward(call)`` returns what ``call.empty_outputs()`` would, filled.
        backward: ``backward(call, outputs, grads, wanted)``, with ``outputs`` what forward returned, where the call
            saves it, and ``grads`` their gradients or None, returns contiguous gradients for at least the ``wanted``
            tensors. None: there is no backward.
        why_not: the reason why a call cannot run, forward or backward, or None.
        why_not_backward: a reason that holds for backward alone.
    """

    forward: Callable[[Any], tuple[Tensor, ...]]
    backward: Callable[[Any, tuple[Tensor, ...], tuple[Tensor | None, ...], frozenset[str]], Gradients] | None = None
    why_not: Callable[[Any], str | None] = always
    why_not_backward: Callable[[Any], str | None] = always


@dataclass(frozen=True)
class Backend:
    """A set of implementations; ``missing()`` is the reason why none can run on this machine, or None."""

    name: str
    missing: Callable[[], str | None]
    operators: Mapping[str, Implementation] = field(default_factory=dict)

    def why_not(self, call: Call, direction: str = "fwd") -> str | None:
        """The reason why this call cannot run here, or None. ``direction``: ``"fwd"`` or ``"bwd"``."""
        reason = self.missing()
        if reason is not None:
            return reason
        implementation = self.operators.get(call.op)
        if implementation is None:
            return f"the {self.name} backend has no {call.op}"
        if direction == "bwd" and implementation.backward is None:
            return f"the {self.name} backend has no backward of {call.op}"
        reason = implementation.why_not(call)
        if reason is None and direction == "bwd":
            reason = implementation.why_not_backward(call)
        return reason
