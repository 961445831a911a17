"""LTX-Video: full attention with one norm across heads, and a rotation of its own for every head."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers import transformer_ltx as ltx
from torch import Tensor

from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    by_sample_or_token,
    gated_rows,
    modulated_rows,
    parts_of,
)
from vdcore.integrations.diffusers.clip import pairs_agree, samples_agree
from vdcore.integrations.diffusers.family import Family, Forward, packed
from vdcore.integrations.diffusers.fused import Fused


class LTXAttention(Fused):
    """Self-attention and cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (ltx.apply_rotary_emb,)

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        if encoder_hidden_states is None and not self.knows(image_rotary_emb):
            return None
        return self.self_or_cross_attention(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    def knows(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        return tables is None or all(self.clip.once(interleaved_agree, x) for x in tables)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(B, N, H*D)`` with every angle twice."""
        cos, sin = (x[0, :, 0::2].unflatten(-1, (q.shape[2], -1)) for x in rotary)
        return cos, sin


def interleaved_agree(table: Tensor) -> bool:
    return pairs_agree(table) and samples_agree(table)


def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor | str:
    """Modulated by ``(B, 1, 6 C)`` or ``(B, N, 6 C)``."""
    if not by_sample_or_token(hidden_states, temb) or len(self.scale_shift_table) != 6:
        return NEITHER
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts_of(self.scale_shift_table, temb)
    attended = self.attn1(
        hidden_states=modulated_rows(self.norm1, hidden_states, shift, scale),
        encoder_hidden_states=None,
        image_rotary_emb=image_rotary_emb,
    )
    x = gated_rows(hidden_states, attended, gate)
    x = x + self.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    return gated_rows(x, self.ff(modulated_rows(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


FAMILY = Family(
    processors={ltx.LTXVideoAttnProcessor: LTXAttention},
    forwards={ltx.LTXVideoTransformerBlock: Forward(block, GATED)},
    grids={ltx.LTXVideoTransformer3DModel: packed},
)
