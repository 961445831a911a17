"""Allegro: full attention whose three thirds of a head turn with frame, row and column, each split in halves."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.transformers import AllegroTransformer3DModel
from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import output_projection, project, video
from vdcore.integrations.diffusers.blocks.modulation import GATED, RANK, transformer_block
from vdcore.integrations.diffusers.fused import Call, Fused
from vdcore.rope import Style

registry.grid(AllegroTransformer3DModel, axes=(2, 3, 4))


@registry.processor(AllegroAttnProcessor2_0)
class AllegroAttention(Fused):
    """Self-attention with rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb_allegro,)
    STYLE: ClassVar[Style] = "half"

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        plain = attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
        alone = not attn.residual_connection and attn.rescale_output_factor == 1
        if not (plain and alone and call.x.ndim == 3):
            return None
        if call.text is not None:
            return self.cross_attention(attn, call.x, call.text, call.mask)
        if call.mask is not None and self.clip.valid_keys(call.mask) is not None:
            return None
        q, k, v = project(attn, call.x)
        rope = self.rope(call.rotary, q)
        if rope is not None:
            q, k = halves_together(q), halves_together(k)
        return output_projection(attn, video(self.clip, q, k, v, None, rope))

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From a table and positions of each axis: the thirds one after another, ``(N, D/2)``."""
        pairs = [(cos[at[0]], sin[at[0]]) for (cos, sin), at in zip(*rotary)]
        cos, sin = (torch.cat([table.chunk(2, -1)[0] for table in thirds], -1) for thirds in zip(*pairs))
        return cos, sin


def halves_together(x: Tensor) -> Tensor:
    """``(..., t1 t2 h1 h2 w1 w2) -> (..., t1 h1 w1 t2 h2 w2)``: scores do not mind, if q and k agree."""
    return x.unflatten(-1, (3, 2, -1)).transpose(-3, -2).flatten(-3)


@registry.forward(AllegroTransformerBlock, serves=GATED)
def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Tensor | str:
    """Modulated by ``(B, 6 C)``."""
    assert temb is not None  # the host needs it as well
    x = hidden_states
    if x.ndim != 3:
        return RANK
    parts = (self.scale_shift_table + temb.reshape(x.shape[0], 6, -1)).unbind(1)  # (B, C)

    def attend(rows: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        return self.attn1(rows, encoder_hidden_states=None, **given)

    def cross(x: Tensor) -> Tensor:
        given = {"attention_mask": encoder_attention_mask, "image_rotary_emb": None}
        return self.attn2(x, encoder_hidden_states=encoder_hidden_states, **given)

    return transformer_block(x, parts, (self.norm1, self.norm2), attend, None if self.attn2 is None else cross, self.ff)
