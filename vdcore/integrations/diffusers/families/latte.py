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
from vdcore.integrations.diffusers import _frames, _inference
from vdcore.integrations.diffusers._attention import is_plain
from vdcore.integrations.diffusers._clip import Clip
from vdcore.integrations.diffusers._host import unknown_source
from vdcore.integrations.diffusers._inference import Piece
from vdcore.integrations.diffusers._modulation import gated, modulated
from vdcore.integrations.diffusers._swap import Change, changed_forward, host_forward
from vdcore.integrations.diffusers.motion import feed_forward


def plan(model: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve the model, or why not."""
    reason = unknown_source(LatteTransformer3DModel.forward) or changed_forward(model)
    if reason is not None:
        return reason
    if type(model.proj_out) is not nn.Linear or type(model.norm_out) is not nn.LayerNorm:
        return "its last layers are not plain ones"
    changes = [Change(model, "model in (B, T, S, C)", forward=forward)]
    for blocks, attention, block_forward in (
        (model.transformer_blocks, _frames.SpatialAttention, spatial_block_forward),
        (model.temporal_transformer_blocks, _frames.TemporalAttention, temporal_block_forward),
    ):
        for block in blocks:
            reason = why_not_block(block)
            if reason is not None:
                return reason
            changes.append(Change(block, "modulate, gate_residual", forward=block_forward))
            changes += [
                Change.of_processor(attn, attention, clip) for attn in (block.attn1, block.attn2) if attn is not None
            ]
    return changes


def why_not_block(block: Any) -> str | None:
    if type(block) is not BasicTransformerBlock:
        return f"its block is a {type(block).__name__}"
    reason = unknown_source(BasicTransformerBlock.forward) or changed_forward(block)
    if reason is not None:
        return reason
    if block.norm_type != "ada_norm_single":
        return f"its block has the norm {block.norm_type}"
    if block.only_cross_attention or block.pos_embed is not None or getattr(block, "fuser", None) is not None:
        return "its block is not Latte's"
    if any(type(norm) is not nn.LayerNorm for norm in (block.norm1, block.norm2)):
        return "its block's norms are not LayerNorm"
    for attn in (block.attn1, block.attn2):
        reason = reason or (None if attn is None else _frames.why_not(attn))
    return reason


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
        given = (encoder_attention_mask, enable_temporal_attentions, return_dict)
        return host_forward(
            self, "a text mask, which the host gives per frame", hidden_states, timestep, encoder_hidden_states, *given
        )
    B, _, T, H, W = hidden_states.shape
    p = self.config.patch_size
    x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, T))  # (B, T, S, C)
    conditions = {"resolution": None, "aspect_ratio": None}
    steps, embedded = self.adaln_single(timestep, conditions, batch_size=B, hidden_dtype=x.dtype)
    text = self.caption_projection(encoder_hidden_states)
    for i, (spatial, temporal) in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks)):
        x = _run(self, spatial, x, text, steps)
        if enable_temporal_attentions:
            if i == 0 and T > 1:
                x = x + self.temp_pos_embed.to(x.dtype)[:, :, None]
            x = _run(self, temporal, x, None, steps)

    shift, scale = (self.scale_shift_table[None] + embedded[:, None]).unbind(1)  # (B, C)
    x = modulated(self.norm_out, x, shift, scale)
    grid = T, H // p, W // p
    if is_plain(self.proj_out):
        weight, bias = self.proj_out.weight, self.proj_out.bias
        out = vdcore.unpatchify(x, weight, bias, channels=self.out_channels, patch=(1, p, p), grid=grid)
    else:
        patches = self.proj_out(x).view(B, *grid, p, p, self.out_channels)
        out = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, self.out_channels, T, grid[1] * p, grid[2] * p)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _run(model: Any, block: nn.Module, x: Tensor, text: Tensor | None, steps: Tensor) -> Tensor:
    given = (x, None, text, None, steps, None, None)
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *given)
    return block(*given)


def spatial_block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _block_forward(self, False, hidden_states, *args, **kwargs)


def temporal_block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _block_forward(self, True, hidden_states, *args, **kwargs)


def _block_forward(
    self: Any,
    temporal: bool,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A block on ``(B, T, S, C)`` with a text ``(B, L, C)`` and timesteps ``(B, 6 C)``."""
    if hidden_states.ndim != 4:
        given = (hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep)
        return host_forward(self, "called by a module in the host's layout", *given, *args, **kwargs)
    assert timestep is not None
    x = hidden_states
    table = self.scale_shift_table[None] + timestep.unflatten(-1, (6, -1))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)  # (B, C)
    count = _inference.tokens_at_once(self, x) if temporal and self.attn2 is None and self._chunk_size is None else None
    if count is not None:
        return _without_gradients(self, x, count, (shift, scale, gate), (shift_mlp, scale_mlp, gate_mlp))
    attended = _frames.attend(self.attn1, modulated(self.norm1, x, shift, scale), temporal=temporal)
    x = gated(x, attended, gate)
    if self.attn2 is not None:
        x = _frames.attend(self.attn2, x, encoder_hidden_states, temporal=temporal) + x
    return gated(x, feed_forward(self, self.ff, modulated(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


def _without_gradients(
    block: Any, x: Tensor, count: int, attention: tuple[Tensor, ...], mlp: tuple[Tensor, ...]
) -> Tensor:
    """The block with shift, scale and gate ``(B, C)`` of either half."""
    tokens = x.shape[1] * x.shape[2]
    before = [_inference.Norm(block.norm1, scale, shift) for shift, scale, _ in zip(*attention)]
    leave = [_inference.Residual(block.attn1.to_out[0], tokens, gate) for gate in attention[2]]
    between = [_inference.Norm(block.norm2, scale, shift) for shift, scale, _ in zip(*mlp)]
    hidden = _inference.Hidden()
    feed = [_inference.FeedForwardResidual(block.ff, tokens, hidden, gate) for gate in mlp[2]]

    def first(piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> Tensor:
        return before[piece.b](x, piece)

    def second(piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> None:
        leave[piece.b].write(x, attended, out)
        feed[piece.b].write(out, between[piece.b](out, piece), out)

    return _inference.run(x, count, [block.attn1], [first, second])
