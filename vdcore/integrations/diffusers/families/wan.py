"""Wan and SkyReels V2, which share their attention; Helios, which rotates in another layout."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers import transformer_helios as helios
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.models.transformers import transformer_wan as wan
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope, leave_projection, project, qk_norm, video
from vdcore.integrations.diffusers._clip import Clip, causal_block, samples_agree
from vdcore.integrations.diffusers._fused import Fused
from vdcore.mask import FrameMask
from vdcore.rope import Rope


class WanAttention(Fused):
    """Self-attention with one norm across heads and interleaved rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (wan._get_qkv_projections, wan.WanRotaryPosEmbed.forward)

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.why_not_now() is None and attention_mask is None:
            if encoder_hidden_states is None:
                out = self.self_attention(attn, hidden_states, lambda q: self.rope(rotary_emb, q))
                return leave_projection(attn, out)
            if rotary_emb is None and attn.add_k_proj is None:
                served = self.cross_attention(attn, hidden_states, encoder_hidden_states, None)
                assert served is not None
                return served
        return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def rope(self, tables: tuple[Tensor, Tensor] | None, q: Tensor) -> Rope | None:
        """From tables ``(1, N, 1, D)`` with every angle twice: the host reads one cosine and the other sine."""
        if tables is None:
            return None
        cos, sin = tables
        return as_rope(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2], q, self.clip.split(q.shape[1]))


class SkyReelsAttention(WanAttention):
    """As Wan; for diffusion forcing the host masks blocks of frames causally, by a dense mask of all tokens."""

    RELIES: ClassVar[tuple[Any, ...]] = (skyreels._get_qkv_projections, skyreels.SkyReelsV2RotaryPosEmbed.forward)

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        block = None
        if attention_mask is not None and encoder_hidden_states is None and self.clip.mask is None:
            block = self.clip.once(causal_block, attention_mask)
        if block is None or self.why_not_now() is not None:
            return super().serve(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        blocks = Clip(FrameMask.causal())
        blocks.announce((hidden_states.shape[1] // block, block, 1))
        q, k, v = project(attn, hidden_states)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        rope = None
        if rotary_emb is not None:
            cos, sin = rotary_emb
            rope = as_rope(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2], q, blocks.split(q.shape[1]))
        return leave_projection(attn, video(blocks, q, k, v, norm, rope))


class HeliosAttention(Fused):
    """Self-attention over history and clip; history keys may be amplified, which is left to the host's own code."""

    RELIES: ClassVar[tuple[Any, ...]] = (helios._get_qkv_projections, helios.apply_rotary_emb_transposed)

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        known = self.why_not_now() is None and attention_mask is None
        if known and encoder_hidden_states is None and not attn.is_amplify_history:
            if rotary_emb is None or self.clip.once(samples_agree, rotary_emb):
                out = self.self_attention(attn, hidden_states, lambda q: self.rope(rotary_emb, q))
                return leave_projection(attn, out)
        elif known and encoder_hidden_states is not None and rotary_emb is None:
            served = self.cross_attention(attn, hidden_states, encoder_hidden_states, None)
            assert served is not None
            return served
        given = (encoder_hidden_states, attention_mask, rotary_emb, original_context_length)
        return self.as_host(attn, hidden_states, *given)

    def rope(self, table: Tensor | None, q: Tensor) -> Rope | None:
        """From a table ``(B, N, 2 D)``: cosines, then sines, every angle twice."""
        if table is None:
            return None
        cos, sin = table[0].chunk(2, -1)
        return as_rope(cos[..., 0::2], sin[..., 1::2], q, self.clip.split(q.shape[1]))
