"""Cosmos: full attention with a norm per head and halves rotated; cross attention to text."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
from diffusers.models.transformers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos as cosmos
from torch import Tensor

from vdcore.integrations.diffusers.family import Family, channels_first
from vdcore.integrations.diffusers.fused import Fused
from vdcore.rope import Style


class CosmosAttention(Fused):
    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, cosmos.CosmosRotaryPosEmbed.forward)
    STYLE: ClassVar[Style] = "half"

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        return self.self_or_cross_attention(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, D)`` with the angles of one half repeated for the other."""
        cos, sin = (x[:, : x.shape[1] // 2] for x in rotary)
        return cos, sin


FAMILY = Family(
    processors={cosmos.CosmosAttnProcessor2_0: CosmosAttention},
    grids={CosmosTransformer3DModel: channels_first},
)
