"""Latte: spatial and temporal blocks by turns, modulated by the timestep.

The host permutes between ``(B*T, S, C)`` and ``(B*S, T, C)`` twice per layer, and repeats text and timestep for every
frame and position. Here every block runs on ``(B, T, S, C)``, with one text and one timestep per clip.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers import factorized, inference, registry
from vdcore.integrations.diffusers.blocks.modulation import GATED, gated, modulated
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.swap import SHARED, Change, changed_forward, is_of, is_plain
from vdcore.models.layout import switch_layout


@registry.factorized(LatteTransformer3DModel)
def plan(model: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve the model, or why not."""
    reason = unknown_source(LatteTransformer3DModel.forward) or changed_forward(model)
    if reason is not None:
        return reason
    if not (is_of(model.proj_out, nn.Linear) and is_of(model.norm_out, nn.LayerNorm)):
        return "its last layers are not plain ones"
    kinds = (
        (model.transformer_blocks, spatial_block, factorized.SpatialAttention),
        (model.temporal_transformer_blocks, temporal_block, factorized.TemporalAttention),
    )
    changes = (
        factorized.changes_of_block(
            block, BasicTransformerBlock, forward_of_kind, GATED, attention, clip, why_not_block
        )
        for blocks, forward_of_kind, attention in kinds
        for block in blocks
    )
    return factorized.changes_of_module(model, forward, "model in (B, T, S, C)", clip, changes)


def why_not_block(block: Any) -> str | None:
    if block.norm_type != "ada_norm_single":
        return f"its block has the norm {block.norm_type}"
    if block.only_cross_attention or block.pos_embed is not None or getattr(block, "fuser", None) is not None:
        return "its block is not Latte's"
    if not all(is_of(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
        return "its block's norms are not LayerNorm"
    return None


def forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    enable_temporal_attentions: bool = True,
    return_dict: bool = True,
) -> Any:
    """The model on video ``(B, C, T, H, W)``."""
    if encoder_attention_mask is not None:
        return "a text mask, which the host gives per frame"
    if is_observed((self.norm_out, self.proj_out)):
        return OBSERVED
    if encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 0:
        return "a text of no tokens, of which the host makes no rows"
    B, _, T, H, W = hidden_states.shape
    p = self.config.patch_size
    x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, T))  # (B, T, S, C)
    conditions = {"resolution": None, "aspect_ratio": None}
    steps, embedded = self.adaln_single(timestep, conditions, batch_size=B, hidden_dtype=x.dtype)
    text = self.caption_projection(encoder_hidden_states)
    split = getattr(self, SHARED).shared(T, x.shape[2])
    for i, (spatial, temporal) in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks)):
        x = _run(self, spatial, x, text, steps, temporal=False)
        if enable_temporal_attentions:
            if i == 0 and (T if split is None else split.sizes[0]) > 1:
                frames = self.temp_pos_embed.to(x.dtype)[:, :, None]
                x = x + (frames if split is None else split.own_frames(frames, 1))
            x = switch_layout(x, "frames", "tokens", split)
            x = _run(self, temporal, x, None, steps, temporal=True)
            x = switch_layout(x, "tokens", "frames", split)

    shift, scale = (self.scale_shift_table[None] + embedded[:, None]).unbind(1)  # (B, C)
    x = modulated(self.norm_out, x, shift, scale)
    grid = T, H // p, W // p
    # torch.jit traces sizes, which an operator of ours does not take.
    if is_plain(self.proj_out) and type(self.proj_out) is nn.Linear and not torch.jit.is_tracing():
        weight, bias = self.proj_out.weight, self.proj_out.bias
        out = vdcore.unpatchify(x, weight, bias, channels=self.out_channels, patch=(1, p, p), grid=grid)
    else:
        patches = self.proj_out(x).view(B, *grid, p, p, self.out_channels)
        out = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, self.out_channels, T, grid[1] * p, grid[2] * p)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _run(model: Any, block: nn.Module, x: Tensor, text: Tensor | None, steps: Tensor, *, temporal: bool) -> Tensor:
    def run(x: Tensor, text: Tensor | None, steps: Tensor) -> Tensor:
        given = (x, None, text, None, steps, None, None)
        if torch.is_grad_enabled() and model.gradient_checkpointing:
            return model._gradient_checkpointing_func(block, *given)
        return block(*given)

    return factorized.run_block(
        model,
        block,
        lambda: run(x, text, steps),
        lambda: factorized.in_rows(run, x, temporal, text, steps),
        temporal=temporal,
    )


def spatial_block(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | str:
    return _block(self, False, hidden_states, *args, **kwargs)


def temporal_block(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | str:
    return _block(self, True, hidden_states, *args, **kwargs)


def _block(
    self: Any,
    temporal: bool,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor | str:
    """A block on ``(B, T, S, C)`` with a text ``(B, L, C)`` and timesteps ``(B, 6 C)``."""
    if hidden_states.ndim != 4:
        return factorized.HOSTS_LAYOUT
    assert timestep is not None
    x = hidden_states
    table = self.scale_shift_table[None] + timestep.unflatten(-1, (6, -1))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts = table.unbind(1)  # (B, C)
    count = inference.tokens_at_once(self, x) if temporal and self.attn2 is None and self._chunk_size is None else None
    if count is not None:
        return inference.run(x, count, [self.attn1], _stages(self, x.shape[1] * x.shape[2], parts))
    attended = factorized.attend(self, self.attn1, modulated(self.norm1, x, shift, scale), temporal=temporal)
    x = gated(x, attended, gate)
    if self.attn2 is not None:
        x = factorized.attend(self, self.attn2, x, encoder_hidden_states, temporal=temporal) + x
    hidden = modulated(self.norm2, x, shift_mlp, scale_mlp)
    return gated(x, factorized.feed_forward(self, self.ff, hidden), gate_mlp)


def _stages(block: Any, tokens: int, parts: tuple[Tensor, ...]) -> list[inference.Stage]:
    """The temporal block with shift, scale and gate ``(B, C)`` of either half, for pieces of a clip."""
    hidden = inference.Hidden()
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    return [
        inference.Stage(enter=[inference.Norm(block.norm1, *pair) for pair in zip(scale, shift)]),
        inference.Stage(
            leave=[inference.Residual(block.attn1.to_out[0], tokens, row) for row in gate],
            norm=[inference.Norm(block.norm2, *pair) for pair in zip(scale_mlp, shift_mlp)],
            feed=[inference.FeedForwardResidual(block.ff, tokens, hidden, row) for row in gate_mlp],
        ),
    ]
