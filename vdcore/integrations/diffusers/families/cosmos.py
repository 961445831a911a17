"""Cosmos: full attention with a norm per head and halves rotated; cross attention to text."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
from diffusers.models.transformers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos as cosmos
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.fused import Call, Fused
from vdcore.rope import Style

registry.grid(CosmosTransformer3DModel, axes=(2, 3, 4))


@registry.processor(cosmos.CosmosAttnProcessor2_0)
class CosmosAttention(Fused):
    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, cosmos.CosmosRotaryPosEmbed.forward)
    STYLE: ClassVar[Style] = "half"

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        if call.mask is not None and call.mask.ndim != 4:  # given to torch's attention as it is
            return None
        return self.self_or_cross_attention(attn, call)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, D)`` with the angles of one half repeated for the other."""
        cos, sin = (x[:, : x.shape[1] // 2] for x in rotary)
        return cos, sin
