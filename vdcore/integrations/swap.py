"""How a module of the host comes to run vdcore, and how it is put back.

Two kinds of change, each of which holds all that undoing it needs, so that copies and pickles of a swapped model can be
swapped out as well: an attention module gets another processor, which keeps the one it replaced; any other module gets
another class, derived from its own, which remembers it. Parameters, buffers, hooks and child modules are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vdcore.integrations.diffusers._clip import Clip

# Why calls of a module or processor went to the host after all.
_left_at_run_time: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def note_left(who: Any, reason: str) -> None:
    """Remembers why a call was left to the host, for the report."""
    if not torch.compiler.is_compiling():
        _left_at_run_time.setdefault(who, set()).add(reason)


def reasons_left(who: Any) -> set[str]:
    return _left_at_run_time.get(who, set())


# ---- Processors ----


class Processor:
    """Takes the place of an attention processor. ``__call__`` has the signature of the one it replaces.

    Args:
        host: the processor that it replaced.
        clip: what the attention of the model shares.
    """

    SERVES: ClassVar[str]  # which operator, for the report

    # The host's attention backends and context parallelism are set here when someone asks for them after the swap.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, host: Any, clip: Clip) -> None:
        self.host = host
        self.clip = clip

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def why_not_now(self) -> str | None:
        """Why this processor may not serve calls at present."""
        if self._parallel_config is not None:
            return "context parallelism was turned on after the swap"
        if self._attention_backend is not None:
            return f"set_attention_backend({str(self._attention_backend)!r}) was called after the swap"
        return None

    def leave_unmasked(self, reason: str, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`leave`, for attention that the mask is for: leaving it would be a wrong result, not a slow one."""
        if self.clip.mask is not None:
            raise RuntimeError(f"swap_in: a call cannot run under {self.clip.mask}: {reason}")
        return self.leave(reason, attn, *args, **kwargs)

    def leave(self, reason: str, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Hands one call to the host's own processor."""
        note_left(self, reason)
        host = self.host
        if self._attention_backend is not None or self._parallel_config is not None:
            host = copy(host)
            host._attention_backend, host._parallel_config = self._attention_backend, self._parallel_config
        return host(attn, *args, **kwargs)


def why_not_processor(attn: nn.Module) -> str | None:
    """What, outside of its own mathematics, keeps an attention module from being served."""
    processor = attn.processor
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is on"
    return changed_forward(attn)


# ---- Classes ----


def changed_forward(module: nn.Module) -> str | None:
    """A reason if the module's own forward is not the one that runs when it is called."""
    if "forward" in module.__dict__:
        return "its forward is replaced already, by a hook or by offloading"
    return None


class ServedModule:
    """Base of the classes that replace a host's."""

    host: ClassVar[type[nn.Module]]
    serves: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a pickle names the host's class and forward instead.
        state = self.__dict__.copy()
        return _rebuild, (type(self).host, type(self)._forward, type(self).serves), state  # type: ignore[attr-defined]


def _rebuild(host: Any, forward: Callable[..., Any], serves: str) -> nn.Module:
    cls = served_class(host, forward, serves)
    return cls.__new__(cls)


@lru_cache(maxsize=256)
def served_class(host: Any, forward: Callable[..., Any], serves: str) -> type[nn.Module]:
    """The host's class with another forward. It keeps the name, by which hosts save and load."""

    @wraps(host.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    names = {
        "forward": replaced,
        "host": host,
        "serves": serves,
        "_forward": staticmethod(forward),
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    return type(host.__name__, (ServedModule, host), names)


def host_forward(module: nn.Module, reason: str, *args: Any, **kwargs: Any) -> Any:
    """Hands one call of a served module to the host's own forward."""
    note_left(module, reason)
    return type(module).host.forward(module, *args, **kwargs)  # type: ignore[attr-defined]


# ---- Changes ----


@dataclass
class Change:
    """One module, what serves it, and why not if nothing does.

    Args:
        module: of the host.
        processor: makes the processor that replaces the module's.
        forward: replaces the module's forward.
        serves: which operators, for the report.
    """

    module: nn.Module
    serves: str
    processor: Callable[[Any], Processor] | None = None
    forward: Callable[..., Any] | None = None

    @staticmethod
    def of_processor(attn: nn.Module, processor: type[Processor], clip: Clip) -> Change:
        return Change(attn, processor.SERVES, processor=partial(processor, clip=clip))

    def make(self) -> None:
        if self.processor is not None:
            self.module.processor = self.processor(self.module.processor)  # type: ignore[assignment]
        if self.forward is not None:
            host: Any = type(self.module)
            self.module.__class__ = served_class(host, self.forward, self.serves)


def is_served(module: nn.Module) -> bool:
    return isinstance(module, ServedModule) or isinstance(getattr(module, "processor", None), Processor)


def restore(module: nn.Module) -> None:
    """Undoes the changes of one module. Restoring what was never changed does nothing."""
    if isinstance(module, ServedModule):
        module.__class__ = type(module).host  # type: ignore[assignment]
    processor = module.__dict__.get("processor")
    if isinstance(processor, Processor):
        module.processor = processor.host
    Clip.unwatch(module)


def make_all(changes: list[Change]) -> None:
    """All of them, or none if one fails."""
    done: list[nn.Module] = []
    try:
        for change in changes:
            done.append(change.module)
            change.make()
    except BaseException:
        for module in done:
            restore(module)
        raise


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parents before children; the model itself is named after its class."""
    for name, module in model.named_modules():
        yield name or type(model).__name__, module
