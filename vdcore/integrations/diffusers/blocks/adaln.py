"""Adaptive norms that are modules of their own. Blocks that modulate without one are in their model's family."""

from __future__ import annotations

from typing import Any

from diffusers.models import normalization
from diffusers.models.transformers import transformer_cosmos, transformer_easyanimate
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.blocks.modulation import NEITHER, RANK, modulated_rows


@registry.forward(normalization.AdaLayerNormZero, serves="modulate")
def zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> Any:
    if x.ndim != 3:
        return RANK
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, 1)
    return modulated_rows(self.norm, x, shift, scale), gate, shift_mlp, scale_mlp, gate_mlp


@registry.forward(normalization.AdaLayerNormZeroSingle, serves="modulate")
def zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> Any:
    if x.ndim != 3:
        return RANK
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, 1)
    return modulated_rows(self.norm, x, shift, scale), gate


@registry.forward(normalization.AdaLayerNormContinuous, serves="modulate")
def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor | str:
    if x.ndim != 3:
        return RANK
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
    return modulated_rows(self.norm, x, shift, scale)


@registry.forward(normalization.AdaLayerNorm, serves="modulate")
def by_timestep(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor | str:
    if x.ndim != 3 or self.chunk_dim != 1:
        return "modulation that is not one of rows by sample"
    if self.emb is not None:
        temb = self.emb(timestep)
    shift, scale = self.linear(self.silu(temb)).chunk(2, 1)
    return modulated_rows(self.norm, x, shift, scale)


@registry.forward(
    normalization.CogVideoXLayerNormZero, transformer_easyanimate.EasyAnimateLayerNormZero, serves="modulate"
)
def joint_zero(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Any:
    """CogVideoX's and EasyAnimate's: the clip and the text by one norm; only the shape of the gates differs."""
    shift, scale, gate, text_shift, text_scale, text_gate = self.linear(self.silu(temb)).chunk(6, 1)
    video = modulated_rows(self.norm, hidden_states, shift, scale)
    text = modulated_rows(self.norm, encoder_hidden_states, text_shift, text_scale)
    if isinstance(self, normalization.CogVideoXLayerNormZero):
        gate, text_gate = gate[:, None], text_gate[:, None]
    return video, text, gate, text_gate


@registry.forward(transformer_cosmos.CosmosAdaLayerNorm, transformer_cosmos.CosmosAdaLayerNormZero, serves="modulate")
def cosmos(self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Any:
    """Cosmos' norm, and the one that returns a gate as well; modulated by sample or by token."""
    rows = embedded_timestep.shape[1:-1]
    if hidden_states.ndim != 3 or rows not in ((), hidden_states.shape[1:2]):
        return NEITHER
    zero = isinstance(self, transformer_cosmos.CosmosAdaLayerNormZero)
    table = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    if temb is not None:
        table = table + (temb if zero else temb[..., : 2 * self.embedding_dim])
    shift, scale, *gates = table.chunk(3 if zero else 2, -1)
    if rows:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)  # (B, 1, N, C)
    out = modulated_rows(self.norm, hidden_states, shift, scale)
    if not zero:
        return out
    return out, gates[0] if rows else gates[0].unsqueeze(1)
