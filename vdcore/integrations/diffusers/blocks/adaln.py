"""Adaptive norms of full-3D models. Blocks that modulate without a module for it are in ``adaln_blocks``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import normalization
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_easyanimate,
    transformer_kandinsky,
    transformer_mochi,
    transformer_sana_video,
)
from torch import Tensor, nn

from vdcore.integrations.diffusers._attention import is_plain
from vdcore.integrations.diffusers._modulation import modulated
from vdcore.integrations.diffusers._swap import host_forward


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


def sana(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    """SanaVideo's last norm, modulated by ``(B, 1, C)`` or ``(B, N, C)``."""
    if hidden_states.ndim != 3 or temb.shape[1] not in (1, hidden_states.shape[1]):
        given = hidden_states, temb, scale_shift_table
        return host_forward(self, "modulation that is by neither sample nor token", *given)
    table = scale_shift_table + temb.unsqueeze(2).to(scale_shift_table.device)  # (B, 1 or N, 2, C)
    parts = table[:, 0] if temb.shape[1] == 1 else table.unsqueeze(1)
    shift, scale = parts.unbind(-2)
    return _rows(self.norm, hidden_states, shift, scale)


def kandinsky_out(self: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor) -> Tensor:
    """Kandinsky 5's last norm, projection and patches ``(B, T, H, W, p*p*p*C)`` as video, channels last."""
    given = visual_embed, text_embed, time_embed
    if visual_embed.ndim != 5 or time_embed.ndim != 2:
        return host_forward(self, "modulation that is not one of a clip by sample", *given)
    shift, scale = self.modulation(time_embed).chunk(2, -1)
    x = modulated(self.norm, visual_embed.flatten(2, 3), shift, scale).view(visual_embed.shape)
    B, T, H, W, _ = x.shape
    p, q, r = self.patch_size
    patches = self.out_layer(x).view(B, T, H, W, -1, p, q, r)
    return patches.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * p, H * q, W * r, -1)


# What serves each class, and with which operators.
HOSTS: dict[type[nn.Module], tuple[Any, ...]] = {
    normalization.AdaLayerNorm: (by_timestep, "modulate"),
    normalization.AdaLayerNormContinuous: (continuous, "modulate"),
    normalization.AdaLayerNormZero: (zero, "modulate"),
    normalization.AdaLayerNormZeroSingle: (zero_single, "modulate"),
    normalization.CogVideoXLayerNormZero: (joint_zero, "modulate"),
    transformer_cosmos.CosmosAdaLayerNorm: (cosmos, "modulate"),
    transformer_cosmos.CosmosAdaLayerNormZero: (cosmos, "modulate"),
    transformer_easyanimate.EasyAnimateLayerNormZero: (joint_zero, "modulate"),
    transformer_kandinsky.Kandinsky5OutLayer: (kandinsky_out, "modulate"),
    transformer_mochi.MochiLayerNormContinuous: (mochi_continuous, "modulate"),
    transformer_mochi.MochiRMSNormZero: (mochi_zero, "modulate"),
    transformer_sana_video.SanaModulatedNorm: (sana, "modulate"),
}
