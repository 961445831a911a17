"""LTX-Video: full attention with one norm across heads, and a rotation of its own for every head."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers import transformer_ltx as ltx
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    by_sample_or_token,
    parts_of,
    transformer_block,
)
from vdcore.integrations.diffusers.clip import pairs_agree, samples_agree
from vdcore.integrations.diffusers.fused import Call, Fused

registry.grid(ltx.LTXVideoTransformer3DModel, axes=None)


@registry.processor(ltx.LTXVideoAttnProcessor)
class LTXAttention(Fused):
    """Self-attention and cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (ltx.apply_rotary_emb,)

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        if call.text is None and not self.knows(call.rotary):
            return None
        return self.self_or_cross_attention(attn, call)

    def knows(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        return tables is None or all(self.clip.once(interleaved_agree, x) for x in tables)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(B, N, H*D)`` with every angle twice."""
        cos, sin = (x[0, :, 0::2].unflatten(-1, (q.shape[2], -1)) for x in rotary)
        return cos, sin


def interleaved_agree(table: Tensor) -> bool:
    return pairs_agree(table) and samples_agree(table)


@registry.forward(ltx.LTXVideoTransformerBlock, serves=GATED)
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

    def attend(rows: Tensor) -> Tensor:
        return self.attn1(hidden_states=rows, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)

    def cross(x: Tensor) -> Tensor:
        given = {"image_rotary_emb": None, "attention_mask": encoder_attention_mask}
        return self.attn2(x, encoder_hidden_states=encoder_hidden_states, **given)

    parts = parts_of(self.scale_shift_table, temb)
    return transformer_block(hidden_states, parts, (self.norm1, self.norm2), attend, cross, self.ff)
