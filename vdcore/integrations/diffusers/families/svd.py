"""Stable Video Diffusion: spatial blocks, temporal blocks and their blend.

The host permutes the hidden states around every temporal block and repeats the text for every position. Here temporal
blocks run on ``(B, T, S, C)``, and positions share the text of their clip.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender
from diffusers.models.transformers.transformer_temporal import (
    TransformerSpatioTemporalModel,
    TransformerTemporalModelOutput,
)
from torch import Tensor

from vdcore.integrations.diffusers import factorized, inference, registry
from vdcore.integrations.diffusers.blocks.images import add_images_of, rows_of
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.diffusers.ranks.call import served
from vdcore.integrations.swap import SHARED, Change, changed_forward, is_of, is_plain
from vdcore.models.layout import switch_layout


@registry.factorized(TransformerSpatioTemporalModel)
def plan(module: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve a spatio-temporal transformer, or why not. Its spatial blocks are served on their own."""
    reason = unknown_source(TransformerSpatioTemporalModel.forward) or changed_forward(module)
    if reason is not None:
        return reason
    if not is_of(module.time_mixer, AlphaBlender):
        return f"its time mixer is a {type(module.time_mixer).__name__}"
    reason = unknown_source(AlphaBlender.forward) or changed_forward(module.time_mixer)
    if reason is not None:
        return reason
    kind, attention = TemporalBasicTransformerBlock, factorized.TemporalAttention
    changes = (
        factorized.changes_of_block(block, kind, block_forward, "block in (B, T, S, C)", attention, clip)
        for block in module.temporal_transformer_blocks
    )
    return factorized.changes_of_module(module, served(forward, clip), "blocks in (B, T, S, C)", clip, changes)


def forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    image_only_indicator: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """The transformer on ``(B*T, C, H, W)``."""
    assert encoder_hidden_states is not None and image_only_indicator is not None  # the host needs them as well
    if is_observed((self.norm, self.proj_in, self.proj_out, self.time_proj, self.time_pos_embed, self.time_mixer)):
        return OBSERVED
    T = image_only_indicator.shape[-1]
    x = hidden_states.flatten(2)  # (B*T, C, S)
    text = encoder_hidden_states.unflatten(0, (-1, T))[:, 0]  # that of a clip's first frame: (B, L, C)
    rows = rows_of(self.proj_in, self.norm(hidden_states).flatten(2))  # (B*T, S, E)
    split = getattr(self, SHARED).shared(T, rows.shape[1])
    first = 0 if split is None else split.own[0]
    frames = self.time_proj(torch.arange(first, first + T, device=rows.device)).to(rows.dtype)
    frames = self.time_pos_embed(frames)[:, None]  # (T, 1, E)
    for block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            rows = self._gradient_checkpointing_func(block, rows, None, encoder_hidden_states, None)
        else:
            rows = block(rows, encoder_hidden_states=encoder_hidden_states)
        mixed = rows.unflatten(0, (-1, T)) + frames  # (B, T, S, E)
        mixed = switch_layout(mixed, "frames", "tokens", split)
        mixed = run_temporal_block(self, temporal_block, mixed, text)
        mixed = switch_layout(mixed, "tokens", "frames", split).flatten(0, 1)
        rows = blend(self.time_mixer, rows, mixed, image_only_indicator)
    out = add_images_of(self.proj_out, rows, x).view(hidden_states.shape)
    return TransformerTemporalModelOutput(sample=out) if return_dict else (out,)


def run_temporal_block(module: Any, block: Any, x: Tensor, text: Tensor) -> Tensor:
    """``(B, T, S, C)`` in and out; the host's block takes rows ``(B*T, S, C)`` and a text for every position."""
    T, S = x.shape[1:3]

    def host() -> Tensor:
        texts = text.repeat_interleave(S, 0)
        return block(x.flatten(0, 1), num_frames=T, encoder_hidden_states=texts).unflatten(0, (-1, T))

    served = partial(block, x, num_frames=T, encoder_hidden_states=text)
    return factorized.run_block(module, block, served, host, temporal=True)


def blend(mixer: Any, spatial: Tensor, temporal: Tensor, image_only: Tensor) -> Tensor:
    """``alpha * spatial + (1 - alpha) * temporal`` in one pass over ``(B*T, S, C)``."""
    if not (is_of(mixer, AlphaBlender) and is_plain(mixer)) or spatial.dtype != temporal.dtype:
        return mixer(x_spatial=spatial, x_temporal=temporal, image_only_indicator=image_only)
    alpha = mixer.get_alpha(image_only, spatial.ndim).to(spatial.dtype)
    first, second = (temporal, spatial) if mixer.switch_spatial_to_temporal_mix else (spatial, temporal)
    return torch.lerp(second, first, alpha)


def block_forward(
    self: Any, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
) -> Tensor | str:
    """The temporal block on ``(B, T, S, C)`` with a text ``(B, L, C)``; rows ``(B*T, S, C)`` are the host's."""
    if hidden_states.ndim != 4:
        return factorized.HOSTS_LAYOUT
    x = hidden_states
    if self.is_res and self._chunk_size is None:
        count = inference.tokens_at_once(self, x, encoder_hidden_states)
        if count is not None:
            return _some_at_a_time(self, x, encoder_hidden_states, count)
    entered = factorized.feed_forward(self, self.ff_in, self.norm_in(x))
    x = entered + x if self.is_res else entered
    x = factorized.attend(self, self.attn1, self.norm1(x), temporal=True) + x
    if self.attn2 is not None:
        x = factorized.attend(self, self.attn2, self.norm2(x), encoder_hidden_states, temporal=True) + x
    out = factorized.feed_forward(self, self.ff, self.norm3(x))
    return out + x if self.is_res else out


def _some_at_a_time(block: Any, x: Tensor, text: Tensor | None, count: int) -> Tensor:
    from_text: list[Tensor | None] = [None]
    if block.attn2 is not None:
        assert text is not None
        from_text = list(factorized.one_key_attention(block.attn2, text).flatten(0, 2))  # B times (C,)
    tokens = x.shape[1] * x.shape[2]
    hidden = inference.Hidden()
    feed_in, feed = ([inference.FeedForwardResidual(ff, tokens, hidden)] for ff in (block.ff_in, block.ff))
    norm_in, norm1, norm3 = ([inference.Norm(norm)] for norm in (block.norm_in, block.norm1, block.norm3))
    leave = [inference.Residual(block.attn1.to_out[0], tokens, row=row) for row in from_text]
    stages = [inference.Stage(norm=norm_in, feed=feed_in, enter=norm1), inference.Stage(leave, norm3, feed)]
    return inference.run(x, count, [block.attn1], stages)
