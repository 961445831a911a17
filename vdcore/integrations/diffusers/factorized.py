"""Factorized models: their spatial, temporal and cross attention on ``(B, T, S, C)``, and how their blocks are served.

diffusers gives its default processor sequences ``(N, n, C)``; a sequence is then a frame on its own. Blocks that are
served as a whole hand over ``(B, T, S, C)``, which that processor never gets, and say by the processor's class along
which axis self-attention runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

import vdcore
from vdcore.integrations.diffusers.attention import (
    heads,
    output_projection,
    project,
    qk_norm,
)
from vdcore.integrations.diffusers.clip import Clip, Keys, TextPairs, text_pairs
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.masks import mask_text
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.diffusers.processor import Processor, why_not_processor
from vdcore.integrations.report import note_left
from vdcore.integrations.swap import SHARED, Change, ServedModule, changed_forward, is_of, is_plain, known_as, runs_ours
from vdcore.modes import is_differentiated

BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock)
HOSTS = (AttnProcessor2_0, FusedAttnProcessor2_0)
UNSEEN = "self-attention with an attention mask whose values are not known when it is traced"


def why_not(attn: Any) -> str | None:
    """Why an attention module is not one that this file serves."""
    if not is_of(attn, Attention):
        return f"{type(attn).__name__} is not diffusers' Attention"
    processor = known_as(type(attn.processor), HOSTS, "__call__")
    if not isinstance(processor, type):
        return f"its processor is {type(attn.processor).__name__}"
    reason = unknown_source(processor.__call__) or why_not_processor(attn)
    if reason is not None:
        return reason
    for name in ("spatial_norm", "group_norm", "norm_cross", "added_kv_proj_dim"):
        if getattr(attn, name) is not None:
            return f"it has {name}"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds or rescales its input"
    if attn.inner_kv_dim != attn.inner_dim:
        return "its keys have other heads than its queries, which diffusers' processor does not serve either"
    return None


class SpatialAttention(Processor):
    """Tokens of a frame attend to one another, or to a text."""

    SERVES = "spatial_attention, cross_attention"
    TEMPORAL = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``hidden_states``: ``(B, T, S, C)``, or as the host has it ``(N, n, C)``, N frames or N positions."""
        as_sequences, is_self = hidden_states.ndim == 3, encoder_hidden_states is None
        reason = self.why_not_now() or ("arguments that it does not know" if args or kwargs else None)
        keys, pairs = None, None
        if reason is None and is_observed((attn.norm_q, attn.norm_k)):
            reason = OBSERVED
        if reason is None and attention_mask is not None and is_self and as_sequences and not self.TEMPORAL:
            pairs = self.clip.once(text_pairs, attention_mask)
            reason = UNSEEN if pairs is None else pairs if isinstance(pairs, str) else None
        elif reason is None and attention_mask is not None:
            found = self._keys(encoder_hidden_states, hidden_states, attention_mask)
            keys, reason = (None, found) if isinstance(found, str) else (found, None)
        if reason is not None:
            if not as_sequences:
                return self._leave_video(reason, attn, hidden_states, encoder_hidden_states)
            given = (hidden_states, encoder_hidden_states, attention_mask, temb, *args)
            return self._leave_to_host(is_self)(reason, attn, *given, **kwargs)
        x, context = hidden_states, encoder_hidden_states
        if pairs is not None:
            return output_projection(attn, self.attended_pairs(attn, x, pairs))
        if context is not None and keys is None and sees_one_key(attn, context):
            out = one_key_attention(attn, context)
            return (out.squeeze(1) if as_sequences else out).expand(*x.shape[:-1], -1)
        return output_projection(attn, self.attended(attn, x, context, keys))

    def attended(self, attn: Any, x: Tensor, context: Tensor | None = None, keys: Keys | None = None) -> Tensor:
        """Attention of ``(B, T, S, C)`` or of ``(N, n, C)`` before its last projection: ``(..., H, D)``."""
        along = 2 if self.TEMPORAL else 1  # (N, 1, n, C), or (N, n, 1, C) if a sequence is of frames
        q, k, v = project(attn, x, context if keys is None or context is None else keys.sort(context))
        as_sequences = x.ndim == 3
        if as_sequences:
            q, k, v = q.unsqueeze(along), *(y if context is not None else y.unsqueeze(along) for y in (k, v))
        if context is None:
            out = self.attend_normed(attn, q, k, v)
        else:
            q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
            out = vdcore.cross_attention(q, k, v, lengths=None if keys is None else keys.lengths, norm=norm)
        return out.squeeze(along) if as_sequences else out

    def attended_pairs(self, attn: Any, x: Tensor, pairs: TextPairs) -> Tensor:
        """Self-attention of padded texts ``(B, n, C)`` before its last projection: ``(B, n, H, D)``."""
        q, k, v = project(attn, x)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        out = vdcore.cross_attention(q.unsqueeze(1), k, v, lengths=pairs.lengths, norm=norm).squeeze(1)
        padding = torch.arange(x.shape[1], device=x.device) >= pairs.lengths[:, None]
        seen = v[:, :1] if pairs.first else torch.zeros_like(v[:, :1])
        return torch.where(padding[..., None, None], seen, out)

    def attend_normed(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of ``(B, T, S, H, D)``, with the norms of q and k that the module has."""
        return self.attend(*qk_norm(q, k, attn.norm_q, attn.norm_k), v)

    def attend(self, q: Tensor, k: Tensor, norm: Any, v: Tensor) -> Any:
        """Self-attention of ``(B, T, S, H, D)``."""
        return vdcore.spatial_attention(q, k, v, norm=norm)

    def _keys(self, context: Tensor | None, x: Tensor, mask: Tensor) -> Keys | str | None:
        if context is None:
            return "self-attention of a clip with an attention mask"
        if mask.shape[0] != x.shape[0] or mask.shape[-1] != context.shape[1]:
            return "an attention mask that the host repeats or pads"
        return self.clip.valid_keys(mask)

    def _leave_video(self, reason: str, attn: Any, x: Tensor, context: Tensor | None) -> Tensor:
        leave = self._leave_to_host(context is None)
        return in_rows(lambda rows, text: leave(reason, attn, rows, text), x, self.TEMPORAL, context)

    def _leave_to_host(self, is_self: bool) -> Callable[..., Tensor]:
        return self.leave_unmasked if self.TEMPORAL and is_self else self.leave


class TemporalAttention(SpatialAttention):
    """A token attends to its position in the other frames, or to a text. Sequences ``(N, n, C)`` are of n frames."""

    SERVES = "temporal_attention, cross_attention"
    TEMPORAL = True

    def attend(self, q: Tensor, k: Tensor, norm: Any, v: Tensor) -> Any:
        return vdcore.temporal_attention(q, k, v, mask=self.clip.frame_mask, norm=norm)


# ---- One key ----


def sees_one_key(attn: Any, context: Tensor) -> bool:
    """Attention to a context ``(B, 1, C)`` of one token, whose weight is 1 whatever the query is.

    With gradients the projection of queries has some, of 0; a hook on it wants its call.
    """
    return context.shape[1] == 1 and not is_differentiated() and is_plain(attn.to_q)


def one_key_attention(attn: Any, context: Tensor) -> Tensor:
    """What every query gets from a context ``(B, 1, C)``: ``(B, 1, 1, C)``. The key stands in for the queries."""
    k, v = (heads(projection(context), attn.heads) for projection in (attn.to_k, attn.to_v))
    out = vdcore.cross_attention(k.unsqueeze(1), k, v)
    return output_projection(attn, out)


# ---- Blocks in (B, T, S, C) ----

HOSTS_LAYOUT = "called by a module in the host's layout"  # a reason to leave the call of a block


def changes_of_block(
    block: Any,
    kind: Any,
    forward: Callable[..., Any],
    serves: str,
    attention: type[SpatialAttention],
    clip: Clip,
    why_not_block: Callable[[Any], str | None] = lambda block: None,
) -> list[Change] | str:
    """The changes that serve a block of this class with both of its attention modules, or why not."""
    if not is_of(block, kind):
        return f"its block is a {type(block).__name__}"
    reason = unknown_source(kind.forward) or changed_forward(block) or why_not_block(block)
    attentions = [attn for attn in (block.attn1, block.attn2) if attn is not None]
    for attn in attentions:
        reason = reason or why_not(attn)
    changes = [attention.change(attn, clip) for attn in attentions]
    return reason or [Change.of_forward(block, forward, serves, clip), *changes]


def changes_of_module(
    module: Any, forward: Callable[..., Any], serves: str, clip: Clip, blocks: Iterable[list[Change] | str]
) -> list[Change] | str:
    """Those of a module and of all its blocks, or why not one of them."""
    changes = [Change.of_forward(module, forward, serves, clip)]
    for found in blocks:
        if isinstance(found, str):
            return found
        changes += found
    return changes


def feed_forward(block: Any, ff: Any, x: Tensor) -> Tensor:
    """The feed-forward layer on ``(B, T, S, C)``, in chunks as large as the host's of ``(B*S, T, C)``."""
    if block._chunk_size is None:
        return ff(x)
    B, T, S, _ = x.shape
    tokens = block._chunk_size * (B * S if block._chunk_dim == 1 else T)
    return torch.cat([ff(chunk) for chunk in x.flatten(0, 2).split(tokens)]).view(B, T, S, -1)


def attend(block: Any, attn: Any, x: Tensor, context: Tensor | None = None, *, temporal: bool) -> Tensor:
    """Calls an attention module of a block with ``(B, T, S, C)`` and a text ``(B, L, C)``.

    If someone gave it a processor of another kind since the swap, or put another module there, it gets rows, as the
    host would give it.
    """
    if takes_clips(attn, temporal):
        return attn(x, encoder_hidden_states=context)
    _note_replaced(block, "an attention module or its processor", temporal and context is None)
    return in_rows(lambda rows, text: attn(rows, encoder_hidden_states=text), x, temporal, context)


def run_block(
    module: Any, block: Any, served: Callable[[], Tensor], host: Callable[[], Tensor], *, temporal: bool
) -> Tensor:
    """Calls a block of a module with ``(B, T, S, C)``, or as the host does if someone put another there since."""
    if not takes_clips(block, temporal):
        _note_replaced(module, "a block", temporal)
    elif is_observed([block]):
        note_left(module, OBSERVED)
    else:
        return served()
    return host()


def takes_clips(module: Any, temporal: bool) -> bool:
    """A block or an attention module takes ``(B, T, S, C)``, as those of the swap do, also inside of wrappers.

    Sequences ``(N, n, C)`` any processor of the swap takes, a clip only one that was made for its axis.
    """
    processor = getattr(module, "processor", None)
    if isinstance(module, ServedModule):
        return runs_ours(type(module))
    if isinstance(processor, SpatialAttention):
        return processor.TEMPORAL is temporal and (type(module) is Attention or is_of(module, Attention))
    if processor is not None or is_of(module, *BLOCKS, Attention):
        return False
    inside = (child for child in module.modules() if is_of(child, *BLOCKS, Attention))
    found = next(inside, None)
    return found is not None and takes_clips(found, temporal)


def _note_replaced(parent: Any, what: str, is_masked: bool) -> None:
    mask = getattr(parent, SHARED).mask
    if is_masked and mask is not None:
        under = mask_text(mask)
        raise RuntimeError(f"swap_in: {what} was replaced since the swap, and cannot run under {under}: swap in again")
    note_left(parent, f"{what} was replaced since the swap")


def in_rows(call: Callable[..., Tensor], x: Tensor, temporal: bool, *conditions: Tensor | None) -> Tensor:
    """A function of sequences, as hosts have them, on ``(B, T, S, C)``; with conditions ``(B, ...)`` for every row."""
    rows = x.transpose(1, 2) if temporal else x
    given = (y if y is None else y.repeat_interleave(rows.shape[1], 0) for y in conditions)
    out = call(rows.flatten(0, 1), *given).unflatten(0, rows.shape[:2])
    return out.transpose(1, 2) if temporal else out
