"""Any processor that calls torch's attention or diffusers' dispatcher, with that one call served by vdcore.

The processor's own code runs, projections, norms and rotations included: as a copy of its function in which the names
of the attention functions mean ours. Nothing outside of that copy sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.integrations.diffusers.attention import cross, video
from vdcore.integrations.diffusers.clip import Keys
from vdcore.integrations.diffusers.processor import Processor, why_not_processor
from vdcore.integrations.report import note_left
from vdcore.integrations.swap import decorated, globals_used, names_used, rebind

DISPATCH, TORCH = "dispatch_attention_fn", "scaled_dot_product_attention"


def why_not(attn: nn.Module) -> str | None:
    """Why the attention calls of a module's processor cannot be taken over."""
    processor: Any = attn.processor
    name = type(processor).__name__
    if isinstance(processor, nn.Module):
        return f"its processor {name} has parameters of its own"
    call = type(processor).__call__
    if not isinstance(inspect.unwrap(call), FunctionType):
        return f"its processor {name} is not Python code"
    known, names = globals_used(call), names_used(call)
    by_torch = known.get("F") is F and TORCH in names
    if decorated(call) is None and not (DISPATCH in known or by_torch):
        return f"its processor {name} calls no softmax attention of torch, as F, or of diffusers"
    if by_torch and (TORCH in known or "functional" in names):
        return f"its processor {name} may call torch's attention by other names than F's"
    return decorated(call) or why_not_processor(attn)


class Options(NamedTuple):
    """What follows query, key and value in calls of torch's attention and of diffusers' dispatcher."""

    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    attention_kwargs: Any = None
    backend: Any = None
    parallel_config: Any = None


class Rebound(Processor):
    """The host's processor with its attention calls served."""

    SERVES = "video_attention, cross_attention"
    NAMES: ClassVar[tuple[str, ...]]  # of the arguments of the host's processor, after the attention module

    @classmethod
    def names(cls, host: Any) -> dict[str, Any]:
        """The signature of the host's processor, by which diffusers chooses what to pass on."""

        @wraps(host.__call__)
        def call(self: Rebound, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return self.serve(attn, *args, **kwargs)

        return {"__call__": call, "NAMES": tuple(inspect.signature(host.__call__).parameters)[2:]}

    def state(self) -> dict[str, Any]:
        # The copied functions belong to this object: a copy makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_calls"}

    def prepare(self) -> None:
        self._calls = self._rebind()

    def serve(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the processor. Derived classes take more than attention over, where they know the call."""
        return self.as_host(attn, *args, **kwargs)

    def as_host(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own code, with its attention served."""
        reason = self.why_not_now()
        if reason is not None:
            return self.leave_unmasked(reason, attn, *args, **kwargs)
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        return self._calls[context is not None](self.host, attn, *args, **kwargs)

    def _rebind(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The host's code for attention of the tokens to themselves, and to a context."""

        def bound(to_context: bool) -> Callable[..., Any]:
            torch_functions = SimpleNamespace(**{**F.__dict__, TORCH: partial(self.torch_attention, to_context)})
            return rebind(self.HOST.__call__, {DISPATCH: partial(self.dispatch, to_context), "F": torch_functions})

        return bound(False), bound(True)

    # ---- the two functions, with the arguments of those that they stand for ----

    def dispatch(
        self, to_context: bool, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """diffusers' dispatcher: ``(B, N, H, D)``."""
        options = Options(*args, **kwargs)
        if isinstance(options.attn_mask, Tensor) and options.attn_mask.ndim == 2:  # (B, n), to the dispatcher
            options = options._replace(attn_mask=options.attn_mask[:, None, None])
        served = self._served(query, key, value, options, to_context)
        if not isinstance(served, str):
            return served
        self._leave(served, query, key, to_context)
        return inspect.unwrap(self.HOST.__call__).__globals__[DISPATCH](query, key, value, *args, **kwargs)

    def torch_attention(
        self, to_context: bool, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """torch's attention: ``(B, H, N, D)``."""
        served: Tensor | str = "attention of other than four dimensions"
        if query.ndim == 4:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            served = self._served(q, k, v, Options(*args, **kwargs), to_context)
        if not isinstance(served, str):
            return served.transpose(1, 2)
        self._leave(served, query.transpose(1, -2), key.transpose(1, -2), to_context)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _leave(self, reason: str, q: Tensor, k: Tensor, to_context: bool) -> None:
        if self.clip.is_bound and not self._is_cross(q, k, to_context):
            raise RuntimeError(f"swap_in: attention cannot run under {self.clip.under}: {reason}")
        note_left(self, reason)

    def _served(self, q: Tensor, k: Tensor, v: Tensor, options: Options, to_context: bool) -> Tensor | str:
        """Attention of ``(B, N, H, D)``, or the reason why it is the host's."""
        if not q.dtype == k.dtype == v.dtype:
            return "queries, keys and values of several dtypes"
        if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
            return "queries, keys and values of shapes that do not fit"
        if options.dropout_p or options.is_causal:
            return "dropout of probabilities" if options.dropout_p else "a causal mask of tokens"
        if options.parallel_config is not None or options.attention_kwargs:
            return "arguments of the dispatcher that vdcore does not know"
        keys, scale = self._keys(options.attn_mask, q, k), options.scale
        if isinstance(keys, str):
            return keys
        if self._is_cross(q, k, to_context) or (not self.clip.is_bound and not (keys is None and scale is None)):
            if keys is None:
                return cross(q, k, v, scale=scale)
            return cross(q, keys.sort(k), keys.sort(v), lengths=keys.lengths, scale=scale)
        if keys is not None or scale is not None:
            return "padding of video tokens, or a scale of its own"
        if self.clip.is_bound and not self.clip.has(q.shape[1]):
            return f"{q.shape[1]} tokens are not those of the clip alone"
        return video(self.clip, q, k, v, None, None)

    def _is_cross(self, q: Tensor, k: Tensor, to_context: bool) -> bool:
        """Attention to other tokens than the clip's own, which no mask is for, also where there are as many."""
        return q.shape[1] != k.shape[1] or (to_context and self.clip.has(q.shape[1]))

    def _keys(self, mask: Any, q: Tensor, k: Tensor) -> Keys | str | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            return f"an attention mask of type {type(mask).__name__}"
        if mask.ndim != 4 or mask.shape[-1] != k.shape[1] or mask.shape[0] not in (1, q.shape[0]):
            return "an attention mask of another shape"
        keys = self.clip.valid_keys(mask)
        return keys.expand(q.shape[0]) if isinstance(keys, Keys) else keys
