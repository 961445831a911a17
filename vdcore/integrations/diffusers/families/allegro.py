"""Allegro: full attention whose three thirds of a head turn with frame, row and column, each split in halves."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.transformers import AllegroTransformer3DModel
from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock
from torch import Tensor

from vdcore.integrations.diffusers.attention import output_projection, project, video
from vdcore.integrations.diffusers.blocks.modulation import GATED, RANK, gated_rows, modulated_rows
from vdcore.integrations.diffusers.family import Family, Forward, channels_first
from vdcore.integrations.diffusers.fused import Fused
from vdcore.rope import Style


class AllegroAttention(Fused):
    """Self-attention with rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb_allegro,)
    STYLE: ClassVar[Style] = "half"

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | None:
        plain = attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
        alone = not attn.residual_connection and attn.rescale_output_factor == 1
        if not (plain and alone and hidden_states.ndim == 3):
            return None
        if encoder_hidden_states is not None:
            return self.cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
        if attention_mask is not None and self.clip.key_lengths(attention_mask) is not None:
            return None
        q, k, v = project(attn, hidden_states)
        rope = self.rope(image_rotary_emb, q)
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
    parts = self.scale_shift_table + temb.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts.unbind(1)  # (B, C)
    attended = self.attn1(
        modulated_rows(self.norm1, x, shift, scale),
        encoder_hidden_states=None,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    x = gated_rows(x, attended, gate)
    if self.attn2 is not None:
        attended = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            image_rotary_emb=None,
        )
        x = attended + x
    return gated_rows(x, self.ff(modulated_rows(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


FAMILY = Family(
    processors={AllegroAttnProcessor2_0: AllegroAttention},
    forwards={AllegroTransformerBlock: Forward(block, GATED)},
    grids={AllegroTransformer3DModel: channels_first},
)
