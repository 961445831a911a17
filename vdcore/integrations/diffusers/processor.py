"""What takes the place of diffusers' attention processors."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn

from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.report import note_left
from vdcore.integrations.swap import IN_MODE, Change, ServedProcessor, changed_forward, in_function_mode


class Processor(ServedProcessor):
    """Takes the place of an attention processor. ``__call__`` has the signature of the one it replaces.

    Args:
        host: the processor that it replaced.
        clip: what the attention of the model shares.
    """

    # The host's attention backends and context parallelism are set here when someone asks for them after the swap.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, host: Any, clip: Clip) -> None:
        self.host = host
        self.clip = clip

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the host's processor, by which diffusers knows processors and makes others from them."""
        return type(self.host)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self),), self.__dict__

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def change(cls, attn: nn.Module, clip: Clip) -> Change:
        return Change.of_processor(attn, cls, clip)

    def why_not_now(self) -> str | None:
        """Why this processor may not serve calls at present."""
        if in_function_mode():
            return IN_MODE
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


def _rebuild(cls: type[Processor]) -> Processor:
    return object.__new__(cls)


def why_not_processor(attn: nn.Module) -> str | None:
    """What, outside of its own mathematics, keeps an attention module from being served."""
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "context parallelism is on"
    return changed_forward(attn)
