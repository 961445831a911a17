"""Any processor that calls torch's attention or diffusers' dispatcher, with that one call served by vdcore.

The processor's own code runs, projections, norms and rotations included: as a copy of its function in which the names
of the attention functions mean ours. Nothing outside of that copy sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.integrations._rebind import rebind
from vdcore.integrations.diffusers._attention import cross, video
from vdcore.integrations.diffusers._clip import Clip
from vdcore.integrations.diffusers._swap import Processor, note_left, why_not_processor

DISPATCH, TORCH = "dispatch_attention_fn", "scaled_dot_product_attention"


def why_not(attn: nn.Module) -> str | None:
    """Why the attention calls of a module's processor cannot be taken over."""
    processor: Any = attn.processor
    name = type(processor).__name__
    if isinstance(processor, nn.Module):
        return f"its processor {name} has parameters of its own"
    call = inspect.unwrap(type(processor).__call__)
    if not isinstance(call, FunctionType):
        return f"its processor {name} is not Python code"
    if not {DISPATCH, TORCH} & _names(call):
        return f"its processor {name} calls no softmax attention of torch or diffusers"
    return why_not_processor(attn)


def _names(function: FunctionType) -> set[str]:
    return set(function.__code__.co_names)


@lru_cache(maxsize=256)
def rebound_class(host: Any, base: Any) -> type[Rebound]:
    """The base with the signature of the host's processor, by which diffusers chooses what to pass on."""

    @wraps(host.__call__)
    def call(self: Rebound, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self.serve(attn, *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": call, "HOST": host, "BASE": base})


def _rebuild(host: Any, base: Any) -> Rebound:
    cls = rebound_class(host, base)
    return cls.__new__(cls)


class Rebound(Processor):
    """The host's processor with its attention calls served."""

    SERVES = "video_attention, cross_attention"
    HOST: ClassVar[type]
    BASE: ClassVar[type]

    def __init__(self, host: Any, clip: Clip) -> None:
        super().__init__(host, clip)
        self._call = self._rebind()
        self._to_context = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The copied function belongs to this object: a copy makes its own.
        return _rebuild, (self.HOST, self.BASE), {**self.__dict__, "_call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._call = self._rebind()

    def serve(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the processor. Derived classes take more than attention over, where they know the call."""
        return self.as_host(attn, *args, **kwargs)

    def as_host(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own code, with its attention served."""
        reason = self.why_not_now()
        if reason is not None:
            return self.leave_unmasked(reason, attn, *args, **kwargs)
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        self._to_context = context is not None
        return self._call(self.host, attn, *args, **kwargs)

    def _rebind(self) -> Callable[..., Any]:
        torch_functions = SimpleNamespace(**{**F.__dict__, TORCH: self.torch_attention})
        return rebind(self.HOST.__call__, {DISPATCH: self.dispatch, "F": torch_functions})

    # ---- the two functions, with the arguments of those that they stand for ----

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """diffusers' dispatcher: ``(B, N, H, D)``."""
        reason = None
        if parallel_config is not None or attention_kwargs:
            reason = "arguments of the dispatcher that vdcore does not know"
        served, reason = self._serve(query, key, value, attn_mask, dropout_p, is_causal, scale, reason)
        if served is not None:
            return served
        self._note(reason, query, key)
        host = inspect.unwrap(self.HOST.__call__).__globals__[DISPATCH]
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
        return host(*given, backend=backend, parallel_config=parallel_config)

    def torch_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's attention: ``(B, H, N, D)``."""
        if query.ndim != 4:
            served: Tensor | None = None
            reason: str | None = "attention of other than four dimensions"
        else:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            served, reason = self._serve(q, k, v, attn_mask, dropout_p, is_causal, scale, None)
        if served is not None:
            return served.transpose(1, 2)
        self._note(reason, query.transpose(1, -2), key.transpose(1, -2))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _note(self, reason: str | None, q: Tensor, k: Tensor) -> None:
        if self.clip.mask is not None and not self._is_cross(q, k):
            raise RuntimeError(f"swap_in: attention cannot run under {self.clip.mask}: {reason}")
        note_left(self, str(reason))

    def _serve(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dropout: float,
        causal: bool,
        scale: float | None,
        reason: str | None,
    ) -> tuple[Tensor | None, str | None]:
        """The result, or the reason why there is none."""
        if dropout or causal:
            reason = "dropout of probabilities" if dropout else "a causal mask of tokens"
        if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
            reason = "queries, keys and values of shapes that do not fit"
        if not q.dtype == k.dtype == v.dtype:
            reason = "queries, keys and values of several dtypes"
        lengths = None
        if mask is not None and reason is None:
            lengths, reason = self._lengths(mask, q, k)
        if reason is not None:
            return None, reason
        if self._is_cross(q, k) or (self.clip.mask is None and not (lengths is None and scale is None)):
            return cross(q, k, v, lengths=lengths, scale=scale), None
        if lengths is not None or scale is not None:
            return None, "padding of video tokens, or a scale of its own"
        return video(self.clip, q, k, v, None, None), None

    def _is_cross(self, q: Tensor, k: Tensor) -> bool:
        """Attention to other tokens than the clip's own, which no mask is for, also where there are as many."""
        return q.shape[1] != k.shape[1] or (self._to_context and self.clip.has(q.shape[1]))

    def _lengths(self, mask: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, str | None]:
        if not isinstance(mask, Tensor):
            return None, f"an attention mask of type {type(mask).__name__}"
        if mask.shape[-1] != k.shape[1] or mask.shape[0] not in (1, q.shape[0]):
            return None, "an attention mask of another shape"
        try:
            lengths = self.clip.key_lengths(mask)
        except ValueError as error:
            return None, str(error)
        return (None if lengths is None else lengths.expand(q.shape[0])), None
