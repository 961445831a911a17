"""What takes the place of diffusers' attention processors."""

from __future__ import annotations

from copy import copy
from functools import lru_cache, partial
from types import new_class
from typing import Any, ClassVar

from torch import nn

from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.report import TURN, note_left
from vdcore.integrations.swap import (
    CHANGED_CLASS,
    IN_MODE,
    Change,
    MadeAtRunTime,
    ServedProcessor,
    changed_forward,
    in_function_mode,
)


class _AsHost(type):
    """To diffusers, which makes processors from others and knows them by their class, the class is the host's."""

    HOST: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.HOST(*args, **kwargs)

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, type) and getattr(cls, "HOST", None) is other)

    def __hash__(cls) -> int:
        return hash(getattr(cls, "HOST", None)) if hasattr(cls, "HOST") else type.__hash__(cls)


class Processor(MadeAtRunTime, ServedProcessor, metaclass=_AsHost):
    """Takes the place of an attention processor. ``__call__`` has the signature of the one it replaces.

    Attributes:
        host: the processor that it replaced.
        clip: what the attention of the model shares.
    """

    HOST: ClassVar[type]
    CALL: ClassVar[tuple[Any]]  # the host's function that it was made for
    # The host's attention backends and context parallelism are set here when someone asks for them after the swap.
    _attention_backend: Any = None
    _parallel_config: Any = None

    host: Any
    clip: Clip

    # Not those of the host's class, which may have none or compare by value.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @classmethod
    def names(cls, host: Any) -> dict[str, Any]:
        """What the class for one class of the host has of its own."""
        return {}

    def prepare(self) -> None:
        """Makes what a copy or a pickle does not carry."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepare()

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def change(cls, attn: nn.Module, clip: Clip) -> Change:
        return Change.of_processor(attn, partial(_take_place, cls), clip)

    def why_not_now(self) -> str | None:
        """Why this processor may not serve calls at present."""
        if TURN.is_hosts:
            return "the host's turn in a check"
        if self.clip.is_swapped_out:
            return "swapped out since"
        if self.HOST.__call__ is not self.CALL[0]:
            return CHANGED_CLASS
        if in_function_mode():
            return IN_MODE
        if self._parallel_config is not None:
            return "context parallelism was turned on after the swap"
        if self._attention_backend is not None:
            return f"set_attention_backend({str(self._attention_backend)!r}) was called after the swap"
        return None

    def leave_unmasked(self, reason: str, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`leave`, for attention across frames: under a mask leaving it would be a wrong result, not a slow
        one, and so it is where other ranks have frames."""
        if self.clip.is_bound and not (TURN.is_hosts or self.clip.is_swapped_out):
            raise RuntimeError(f"swap_in: a call cannot run under {self.clip.under}: {reason}")
        return self.leave(reason, attn, *args, **kwargs)

    def leave(self, reason: str, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Hands one call to the host's own processor."""
        note_left(self, reason)
        host = self.host
        if self._attention_backend is not None or self._parallel_config is not None:
            host = copy(host)
            host._attention_backend, host._parallel_config = self._attention_backend, self._parallel_config
        return host(attn, *args, **kwargs)


def _take_place(base: type[Processor], host: Any, clip: Clip) -> Processor:
    kind: Any = type(host)
    processor: Processor = object.__new__(processor_class(base, kind))
    processor.__setstate__({"host": host, "clip": clip})
    return processor


def processor_class(base: Any, host: Any) -> type[Processor]:
    """A processor of vdcore for one class of the host's, which it is derived from."""
    return _processor_class(base, host, host.__call__)


@lru_cache(maxsize=256)
def _processor_class(base: Any, host: Any, call: Any) -> type[Processor]:
    names = {
        **base.names(host),
        "HOST": host,
        "CALL": (call,),
        "MADE_BY": (processor_class, (base, host)),
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    return new_class(host.__name__, (base, host), {}, lambda space: space.update(names))


def why_not_processor(attn: nn.Module) -> str | None:
    """What, outside of its own mathematics, keeps an attention module from being served."""
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "context parallelism is on"
    return changed_forward(attn)
