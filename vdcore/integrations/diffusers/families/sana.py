"""SanaVideo: blocks around its linear attention, which stays the host's, and its last norm."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_sana_video as sana
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    by_sample_or_token,
    modulated_rows,
    parts_of,
    transformer_block,
)


@registry.forward(sana.SanaVideoTransformerBlock, serves=GATED)
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

    def attend(rows: Tensor) -> Tensor:
        return self.attn1(rows, rotary_emb=rotary_emb)

    def cross(x: Tensor) -> Tensor:
        return self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)

    def feed(rows: Tensor) -> Tensor:
        return self.ff(rows.unflatten(1, (frames, height, width))).flatten(1, 3)

    parts = parts_of(self.scale_shift_table, timestep)
    return transformer_block(x, parts, (self.norm1, self.norm2), attend, None if self.attn2 is None else cross, feed)


@registry.forward(sana.SanaModulatedNorm, serves="modulate")
def norm_out(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor | str:
    """The last norm, modulated by ``(B, 1, C)`` or ``(B, N, C)``."""
    if hidden_states.ndim != 3 or temb.shape[1] not in (1, hidden_states.shape[1]):
        return NEITHER
    table = scale_shift_table + temb.unsqueeze(2).to(scale_shift_table.device)  # (B, 1 or N, 2, C)
    parts = table[:, 0] if temb.shape[1] == 1 else table.unsqueeze(1)
    shift, scale = parts.unbind(-2)
    return modulated_rows(self.norm, hidden_states, shift, scale)
