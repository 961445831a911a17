"""Adaptive norms of full-3D models, and the blocks of Wan and SkyReels V2 that modulate without a module for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import normalization
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_easyanimate,
    transformer_ltx,
    transformer_mochi,
    transformer_skyreels_v2,
    transformer_wan,
)
from torch import Tensor, nn

from vdcore.integrations.diffusers._attention import is_plain
from vdcore.integrations.diffusers._clip import Clip
from vdcore.integrations.diffusers._host import unknown_source
from vdcore.integrations.diffusers._modulation import gated, modulated
from vdcore.integrations.diffusers._swap import Change, changed_forward, host_forward


def plan(module: Any, clip: Clip) -> list[Change] | str:
    """The change that serves an adaptive norm or a block of Wan, or why not."""
    host: Any = type(module)
    forward, serves = HOSTS[host]
    return unknown_source(host.forward) or changed_forward(module) or [Change(module, serves, forward=forward)]


def _rows(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulation of rows ``(B, N, C)`` by ``(B, C)``."""
    return modulated(norm, x.unsqueeze(1), shift, scale).squeeze(1)


def zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> Any:
    if x.ndim != 3:
        return host_forward(self, "rows of another rank", x, timestep, class_labels, hidden_dtype, emb)
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, 1)
    return _rows(self.norm, x, shift, scale), gate, shift_mlp, scale_mlp, gate_mlp


def zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> Any:
    if x.ndim != 3:
        return host_forward(self, "rows of another rank", x, emb)
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, 1)
    return _rows(self.norm, x, shift, scale), gate


def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    if x.ndim != 3:
        return host_forward(self, "rows of another rank", x, conditioning_embedding)
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
    return _rows(self.norm, x, shift, scale)


def by_timestep(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    if x.ndim != 3 or self.chunk_dim != 1:
        return host_forward(self, "modulation that is not one of rows by sample", x, timestep, temb)
    if self.emb is not None:
        temb = self.emb(timestep)
    shift, scale = self.linear(self.silu(temb)).chunk(2, 1)
    return _rows(self.norm, x, shift, scale)


def joint_zero(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Any:
    """CogVideoX's and EasyAnimate's: the clip and the text by one norm; only the shape of the gates differs."""
    shift, scale, gate, text_shift, text_scale, text_gate = self.linear(self.silu(temb)).chunk(6, 1)
    video = _rows(self.norm, hidden_states, shift, scale)
    text = _rows(self.norm, encoder_hidden_states, text_shift, text_scale)
    if isinstance(self, normalization.CogVideoXLayerNormZero):
        gate, text_gate = gate[:, None], text_gate[:, None]
    return video, text, gate, text_gate


def cosmos(self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Any:
    """Cosmos' norm, and the one that returns a gate as well; modulated by sample or by token."""
    given = hidden_states, embedded_timestep, temb
    rows = embedded_timestep.shape[1:-1]
    if hidden_states.ndim != 3 or rows not in ((), hidden_states.shape[1:2]):
        return host_forward(self, "modulation that is by neither sample nor token", *given)
    zero = isinstance(self, transformer_cosmos.CosmosAdaLayerNormZero)
    table = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    if temb is not None:
        table = table + (temb if zero else temb[..., : 2 * self.embedding_dim])
    shift, scale, *gates = table.chunk(3 if zero else 2, -1)
    if rows:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)  # (B, 1, N, C)
    out = _rows(self.norm, hidden_states, shift, scale)
    if not zero:
        return out
    return out, gates[0] if rows else gates[0].unsqueeze(1)


def mochi_zero(self: Any, hidden_states: Tensor, emb: Tensor) -> Any:
    scale, gate, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(4, 1)
    normed = _rows(self.norm, hidden_states, torch.zeros_like(scale), scale)
    return normed, gate, scale_mlp, gate_mlp


def mochi_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    if not is_plain(self.norm):
        return host_forward(self, "its norm has hooks", x, conditioning_embedding)
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    return _rows(self.norm.norm, x, torch.zeros_like(scale), scale)


# ---- Blocks ----


def ltx_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Modulated by ``(B, 1, 6 C)`` or ``(B, N, 6 C)``."""
    B, N, _ = hidden_states.shape
    given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask
    if temb.shape[1] not in (1, N) or len(self.scale_shift_table) != 6:
        return host_forward(self, "modulation that is by neither sample nor token", *given)
    table = self.scale_shift_table.to(temb.device) + temb.unflatten(-1, (6, -1))  # (B, 1 or N, 6, C)
    parts = (table[:, 0] if temb.shape[1] == 1 else table.unsqueeze(1)).unbind(-2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts  # (B, C) or (B, 1, N, C)
    rows = hidden_states.unsqueeze(1)
    attended = self.attn1(
        hidden_states=modulated(self.norm1, rows, shift, scale).squeeze(1),
        encoder_hidden_states=None,
        image_rotary_emb=image_rotary_emb,
    )
    x = gated(rows, attended.unsqueeze(1), gate).squeeze(1)
    x = x + self.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    rows = x.unsqueeze(1)
    out = self.ff(modulated(self.norm2, rows, shift_mlp, scale_mlp).squeeze(1))
    return gated(rows, out.unsqueeze(1), gate_mlp).squeeze(1)


def wan_block(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    if temb.ndim == 4:  # (B, N, 6, C)
        parts = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    else:  # (B, 6, C)
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _wan_block(self, hidden_states, encoder_hidden_states, None, rotary_emb, parts)


def skyreels_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    if temb.ndim == 4:  # (B, 6, N, C)
        parts = (self.scale_shift_table.unsqueeze(2) + temb.float()).unbind(1)
    else:
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _wan_block(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, parts)


def _wan_block(block: Any, x: Tensor, text: Tensor, mask: Tensor | None, rotary_emb: Any, parts: Any) -> Tensor:
    """The block on rows ``(B, N, C)``, modulated by ``(B, C)`` or ``(B, N, C)``; the host does so in float32."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (y if y.ndim == 2 else y.unsqueeze(1) for y in parts)
    rows = x.unsqueeze(1)  # (B, 1, N, C)
    attended = block.attn1(modulated(block.norm1, rows, shift, scale).squeeze(1), None, mask, rotary_emb)
    rows = gated(rows, attended.unsqueeze(1), gate)
    x = rows.squeeze(1)
    normed = block.norm2(x.float()).type_as(x)
    rows = (x + block.attn2(normed, text, None, None)).unsqueeze(1)
    out = block.ffn(modulated(block.norm3, rows, shift_mlp, scale_mlp).squeeze(1))
    return gated(rows, out.unsqueeze(1), gate_mlp).squeeze(1)


# What serves each class, and with which operators.
HOSTS: dict[type[nn.Module], tuple[Callable[..., Any], str]] = {
    normalization.AdaLayerNorm: (by_timestep, "modulate"),
    normalization.AdaLayerNormContinuous: (continuous, "modulate"),
    normalization.AdaLayerNormZero: (zero, "modulate"),
    normalization.AdaLayerNormZeroSingle: (zero_single, "modulate"),
    normalization.CogVideoXLayerNormZero: (joint_zero, "modulate"),
    transformer_cosmos.CosmosAdaLayerNorm: (cosmos, "modulate"),
    transformer_cosmos.CosmosAdaLayerNormZero: (cosmos, "modulate"),
    transformer_easyanimate.EasyAnimateLayerNormZero: (joint_zero, "modulate"),
    transformer_ltx.LTXVideoTransformerBlock: (ltx_block, "modulate, gate_residual"),
    transformer_mochi.MochiLayerNormContinuous: (mochi_continuous, "modulate"),
    transformer_mochi.MochiRMSNormZero: (mochi_zero, "modulate"),
    transformer_skyreels_v2.SkyReelsV2TransformerBlock: (skyreels_block, "modulate, gate_residual"),
    transformer_wan.WanTransformerBlock: (wan_block, "modulate, gate_residual"),
}
