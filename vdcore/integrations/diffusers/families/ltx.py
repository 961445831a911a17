"""LTX-Video and LTX-2: full attention with one norm across heads, and a rotation of its own for every head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_ltx as ltx
from diffusers.models.transformers import transformer_ltx2 as ltx2
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope, leave_projection
from vdcore.integrations.diffusers._clip import pairs_agree, samples_agree
from vdcore.integrations.diffusers._fused import Fused
from vdcore.rope import Rope


class LTXAttention(Fused):
    """Self-attention and cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (ltx.apply_rotary_emb,)

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
            elif encoder_hidden_states is None and attention_mask is None and self.knows(image_rotary_emb):
                out = self.self_attention(attn, hidden_states, lambda q: self.interleaved(image_rotary_emb, q))
                served = leave_projection(attn, out)
            if served is not None:
                return served
        return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def knows(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        return tables is None or all(self.clip.once(interleaved_agree, x) for x in tables)

    def interleaved(self, tables: tuple[Tensor, Tensor] | None, q: Tensor) -> Rope | None:
        """From tables ``(B, N, H*D)`` with every angle twice."""
        if tables is None:
            return None
        cos, sin = (x[0, :, 0::2].unflatten(-1, (q.shape[2], -1)) for x in tables)  # (N, H, D/2)
        return as_rope(cos, sin, q, self.clip.split(q.shape[1]))


def interleaved_agree(table: Tensor) -> bool:
    return pairs_agree(table) and samples_agree(table)


class LTX2Attention(LTXAttention):
    """As LTX, also with halves rotated and outputs gated. Attention between video and audio runs as rebound."""

    RELIES: ClassVar[tuple[Any, ...]] = (ltx2.apply_interleaved_rotary_emb, ltx2.apply_split_rotary_emb)

    @classmethod
    def is_video(cls, name: str) -> bool:
        return "audio" not in name

    def serve(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **perturbation: Any,
    ) -> Tensor:
        alone = encoder_hidden_states is None and attention_mask is None and key_rotary_emb is None
        usual = self.why_not_now() is None and not any(x is not None and x is not False for x in perturbation.values())
        if not (usual and alone and attn.rope_type in ("interleaved", "split") and self.knows(query_rotary_emb)):
            given = (encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb)
            return self.as_host(attn, hidden_states, *given, **perturbation)
        table = self.split if attn.rope_type == "split" else self.interleaved
        out = self.self_attention(attn, hidden_states, lambda q: table(query_rotary_emb, q))
        if attn.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)
        return leave_projection(attn, out)

    def knows(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        if tables is not None and tables[0].ndim == 4:
            return all(self.clip.once(samples_agree, x) for x in tables)
        return super().knows(tables)

    def split(self, tables: tuple[Tensor, Tensor] | None, q: Tensor) -> Rope | None:
        """From tables ``(B, H, N, D/2)``."""
        if tables is None:
            return None
        cos, sin = (x[0].transpose(0, 1) for x in tables)
        return as_rope(cos, sin, q, self.clip.split(q.shape[1]), style="half")
