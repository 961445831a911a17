"""Choosing a backend: data, not code. Every backend says why it cannot run a call; `auto` takes the first that can.
Running a call on it, below autograd.

Operators enter what runs them in the backends' tables (:func:`vdcore.ops.operator.register`); this file imports none.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vdcore.ops import cuda, native, triton
from vdcore.ops.call import Call

Gradients = dict[str, Tensor]  # by tensor name


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the call; the message says why."""


def always(call: Any) -> None:
    """No objection."""
    return None


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
        formula: the call's results by torch's differentiable operators, where the implementation is made of them.
        tangents: ``tangents(call, outputs, given)`` returns the outputs' tangents from those of some of the call's
            tensors, by name. None: they are taken by the operator's formula.
        why_not_tangents: a reason that holds for tangents alone.
    """

    forward: Callable[[Any], tuple[Tensor | None, ...]]
    backward: Callable[[Any, Any, tuple[Tensor | None, ...], frozenset[str]], Gradients] | None = None
    why_not: Callable[[Any], str | None] = always
    why_not_backward: Callable[[Any], str | None] = always
    formula: Callable[[Any], tuple[Tensor, ...]] | None = None
    tangents: Callable[[Any, tuple[Tensor, ...], Gradients], tuple[Tensor, ...]] | None = None
    why_not_tangents: Callable[[Any], str | None] = always


@dataclass(frozen=True)
class Backend:
    """A set of implementations; ``missing()`` is the reason why none can run on this machine, or None.

    Args:
        device: of the tensors that it takes, in words.
        dtypes: of these tensors; empty: every floating one that torch computes with.
    """

    name: str
    missing: Callable[[], str | None]
    device: str = "any"
    dtypes: tuple[torch.dtype, ...] = ()
    operators: dict[str, Implementation] = field(default_factory=dict)

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


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", lambda: None),
        Backend("cpu", native.missing, "CPU", native.DTYPES),
        Backend("triton", triton.missing, "NVIDIA or AMD GPU", triton.DTYPES),
        Backend("cuda", cuda.missing, "NVIDIA GPU", cuda.DTYPES),
        Backend("sdpa", lambda: None),
    )
}

# The order in which `auto` tries. Reasons are measured: bench/results says where.
ORDER: dict[str, tuple[str, ...]] = {
    # The native engine is ahead of torch's attention on every shape it serves.
    "cpu": ("cpu", "sdpa", "reference"),
    # The CUDA kernels come after Triton's until rows in bench/results say otherwise: none has run on a GPU yet.
    "cuda": ("triton", "cuda", "sdpa", "reference"),
}
# What goes before them where a call is nothing but dense attention. An estimate, until rows say otherwise: Triton's
# frame attention reaches 400 to 450 TFLOP/s of an H200, and cuDNN, which torch takes there, 600 and more.
DENSE_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("sdpa",)}


class _Chosen(threading.local):
    """What `use_backend` chose in this thread. Not a ContextVar: torch.compile can guard on this, and not on that."""

    name: str = ""


_chosen = _Chosen()


def check_name(name: str, what: str = "backend") -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    return name


_environment = check_name(os.environ.get("VDCORE_BACKEND") or "auto", "VDCORE_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls of this thread inside the block run on the named backend, unless they name one themselves.

    ``"auto"`` lets vdcore choose. The environment variable ``VDCORE_BACKEND`` does the same for a whole process.

    Raises:
        ValueError: if there is no such backend.
    """
    before = _chosen.name
    _chosen.name = check_name(name)
    try:
        yield
    finally:
        _chosen.name = before


def requested(backend: str | None) -> str:
    """The name asked for: by the call, by ``use_backend``, by ``VDCORE_BACKEND``, in this order; else ``"auto"``."""
    if backend is not None:
        return check_name(backend)
    return _chosen.name or _environment


def candidates(call: Call) -> tuple[str, ...]:
    x = call.main
    order = ORDER["cpu"] if x.is_cpu else ORDER.get(x.device.type, ("reference",))
    first = DENSE_ORDER.get(x.device.type, ())
    return (*first, *(name for name in order if name not in first)) if first and call.is_dense else order


def choose(call: Call, direction: str, backend: str) -> str:
    """The name of the backend that will run this direction of the call.

    Raises:
        BackendError: if the backend was named and cannot.
    """
    if backend != "auto":
        reason = BACKENDS[backend].why_not(call, direction)
        if reason is not None:
            what = call.op if direction == "fwd" else f"the backward of {call.op}"
            raise BackendError(f"{call.op}: backend {backend!r} cannot run {what}: {reason}")
        return backend
    for name in candidates(call):
        if BACKENDS[name].why_not(call, direction) is None:
            return name
    raise BackendError(f"{call.op}: no backend can run this call: {reasons(call)}")


def choose_both(call: Call, backend: str) -> tuple[str, str]:
    """The names for forward and for backward."""
    backward = choose(call, "bwd", backend)  # if nobody can, that is an error now, not later
    # Who can backward can forward; it is who was looked at first, most of the time.
    first = backend if backend != "auto" else candidates(call)[0]
    return backward if backward == first else choose(call, "fwd", backend), backward


def implementation(call: Call, name: str) -> Implementation:
    """What runs the call on the backend. An empty call is everywhere the reference's, which has nothing to do."""
    return BACKENDS["reference" if call.is_empty else name].operators[call.op]


def reasons(call: Call) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it cannot run the call, the usable ones first, in the order of `auto`."""
    tried = candidates(call)
    names = [*tried, *(name for name in BACKENDS if name not in tried)]
    found = [
        (name, BACKENDS[name].why_not(call) or (call.grad and BACKENDS[name].why_not(call, "bwd")) or None)
        for name in names
    ]
    return sorted(found, key=lambda pair: pair[1] is not None)


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it is usable on this machine and else the reason why it is not."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


_calls: Counter[tuple[str, str, str]] = Counter()
_calls_lock = threading.Lock()


def record(op: str, backend: str, direction: str) -> None:
    with _calls_lock:
        _calls[op, backend, direction] += 1


def calls() -> Counter[tuple[str, str, str]]:
    """How many calls each backend has served in this process so far, by ``(operator, backend, "fwd" or "bwd")``."""
    with _calls_lock:
        return Counter(_calls)


# ---- Running a call, below autograd ----

OVERLOADS: dict[str, Any] = {}  # torch operators, by name

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Every call asks these: looked up once.
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing_state, _profiler_enabled = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled


def has_tangent(*tensors: Tensor | None) -> bool:
    """One of the tensors carries a forward-mode derivative, of ``torch.func.jvp`` or a dual level."""
    return forward_ad._current_level >= 0 and any(
        x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def unobserved(tensors: tuple[Tensor | None, ...]) -> bool:
    """Plain tensors with memory, and no mode, tracer or profiler that would have to see the operator."""
    first = tensors[0]
    if (
        first is None
        or not (first.is_cpu or first.is_cuda)
        or _dispatch_modes()
        or _function_modes()
        or _tracing_state() is not None
        or _profiler_enabled()
    ):
        return False
    for x in tensors:  # noqa: SIM110  half the time of all()
        # A view whose memory holds the negative of its values: torch's dispatcher knows what to do.
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def run_forward(call: Call, backend: str) -> tuple[Tensor | None, ...]:
    """The outputs, by the backend that is asked for."""
    return forward_on(call, choose(call, "fwd", backend))


def forward_on(call: Call, chosen: str) -> tuple[Tensor | None, ...]:
    """The outputs, by the backend that was chosen."""
    record(call.op, chosen, "fwd")
    return implementation(call, chosen).forward(call)


def why_no_tangents(call: Call, name: str) -> str | None:
    """The reason why a backend that runs forward does not compute the tangents, or None."""
    its = implementation(call, name)
    return f"the {name} backend has no tangents of {call.op}" if its.tangents is None else its.why_not_tangents(call)


def choose_tangents(call: Call, backend: str) -> tuple[str, str | None]:
    """The backend that computes tangents, and None; or the one that runs forward, and why it does not.

    ``auto`` takes the first that can: tangents need forward's results, whoever made them.
    """
    chosen = choose(call, "fwd", backend)
    reason = why_no_tangents(call, chosen)
    if reason is not None and backend == "auto":
        for name in candidates(call):
            if BACKENDS[name].why_not(call) is None and why_no_tangents(call, name) is None:
                return name, None
    return chosen, reason


def run_backward(
    call: Call,
    backend: str,
    kept: tuple[Any, ...],
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of all the call's tensors, None where it is not wanted."""
    record(call.op, backend, "bwd")
    backward = implementation(call, backend).backward
    assert backward is not None
    found = backward(call, kept, grads, frozenset(compress(call.NAMES, wanted)))
    return [
        _in_dtype(found[name], x.dtype) if yes and x is not None else None
        for name, x, yes in zip(call.NAMES, tensors, wanted)
    ]


def _in_dtype(dx: Tensor, dtype: torch.dtype) -> Tensor:
    """Without a torch operator where nothing is to be done."""
    return dx if dx.dtype == dtype else dx.to(dtype)
