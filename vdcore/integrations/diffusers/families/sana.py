"""SanaVideo: blocks around its linear attention, which stays the host's, and its last norm."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_sana_video as sana
from torch import Tensor

from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    by_sample_or_token,
    gated_rows,
    modulated_rows,
    parts_of,
)
from vdcore.integrations.diffusers.family import Family, Forward


def block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: Any = None,
) -> Tensor | str:
    """Modulated by ``(B, 1, 6 C)`` or ``(B, N, 6 C)``."""
    assert timestep is not None and frames is not None and height is not None and width is not None
    x = hidden_states
    if not by_sample_or_token(x, timestep):
        return NEITHER
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts_of(self.scale_shift_table, timestep)
    x = gated_rows(x, self.attn1(modulated_rows(self.norm1, x, shift, scale), rotary_emb=rotary_emb), gate)
    if self.attn2 is not None:
        attended = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        x = attended + x
    rows = modulated_rows(self.norm2, x, shift_mlp, scale_mlp).unflatten(1, (frames, height, width))
    return gated_rows(x, self.ff(rows).flatten(1, 3), gate_mlp)


def norm_out(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor | str:
    """The last norm, modulated by ``(B, 1, C)`` or ``(B, N, C)``."""
    if hidden_states.ndim != 3 or temb.shape[1] not in (1, hidden_states.shape[1]):
        return NEITHER
    table = scale_shift_table + temb.unsqueeze(2).to(scale_shift_table.device)  # (B, 1 or N, 2, C)
    parts = table[:, 0] if temb.shape[1] == 1 else table.unsqueeze(1)
    shift, scale = parts.unbind(-2)
    return modulated_rows(self.norm, hidden_states, shift, scale)


FAMILY = Family(
    forwards={
        sana.SanaVideoTransformerBlock: Forward(block, GATED),
        sana.SanaModulatedNorm: Forward(norm_out, "modulate"),
    },
)
