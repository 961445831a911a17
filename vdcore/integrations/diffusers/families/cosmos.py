"""Cosmos: full attention with a norm per head and halves rotated; cross attention to text."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
from diffusers.models.transformers import transformer_cosmos as cosmos
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope, leave_projection
from vdcore.integrations.diffusers._fused import Fused
from vdcore.rope import Rope


class CosmosAttention(Fused):
    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, cosmos.CosmosRotaryPosEmbed.forward)

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.why_not_now() is None:
            served = None
            if encoder_hidden_states is not None and image_rotary_emb is None:
                served = self.cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
            elif encoder_hidden_states is None and attention_mask is None:
                out = self.self_attention(attn, hidden_states, lambda q: self.rope(image_rotary_emb, q))
                served = leave_projection(attn, out)
            if served is not None:
                return served
        return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def rope(self, tables: tuple[Tensor, Tensor] | None, q: Tensor) -> Rope | None:
        """From tables ``(N, D)`` with the angles of one half repeated for the other."""
        if tables is None:
            return None
        cos, sin = (x[:, : x.shape[1] // 2] for x in tables)
        return as_rope(cos, sin, q, self.clip.split(q.shape[1]), style="half")
