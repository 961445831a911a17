"""Allegro: full attention whose three thirds of a head turn with frame, row and column, each split in halves."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
import torch
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope, leave_projection, project, video
from vdcore.integrations.diffusers._fused import Fused


class AllegroAttention(Fused):
    """Self-attention with rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb_allegro,)

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        served = None
        if self.knows(attn, hidden_states):
            if encoder_hidden_states is not None:
                served = self.cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
            elif attention_mask is None or self.hides_nothing(attention_mask):
                served = self.rotated(attn, hidden_states, image_rotary_emb)
        if served is not None:
            return served
        return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)

    def knows(self, attn: Any, x: Tensor) -> bool:
        plain = attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
        alone = not attn.residual_connection and attn.rescale_output_factor == 1
        return self.why_not_now() is None and plain and alone and x.ndim == 3

    def hides_nothing(self, mask: Tensor) -> bool:
        try:
            return self.clip.key_lengths(mask) is None
        except ValueError:
            return False

    def rotated(self, attn: Any, x: Tensor, rotary: Any) -> Tensor:
        q, k, v = project(attn, x)
        rope = None
        if rotary is not None:
            tables, positions = rotary
            cos, sin = (
                torch.cat([table[i][position[0]].chunk(2, -1)[0] for table, position in zip(tables, positions)], -1)
                for i in (0, 1)
            )  # (N, D/2): the thirds one after another
            rope = as_rope(cos, sin, q, self.clip.split(q.shape[1]), style="half")
            q, k = halves_together(q), halves_together(k)
        return leave_projection(attn, video(self.clip, q, k, v, None, rope))


def halves_together(x: Tensor) -> Tensor:
    """``(..., t1 t2 h1 h2 w1 w2) -> (..., t1 h1 w1 t2 h2 w2)``: scores do not mind, if q and k agree."""
    return x.unflatten(-1, (3, 2, -1)).transpose(-3, -2).flatten(-3)
