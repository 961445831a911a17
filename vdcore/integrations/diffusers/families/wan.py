"""Wan and SkyReels V2, which share their attention and blocks; Helios, which rotates in another layout."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers import transformer_helios as helios
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.models.transformers import transformer_wan as wan
from torch import Tensor

from vdcore.integrations.diffusers.attention import output_projection
from vdcore.integrations.diffusers.blocks.modulation import GATED, Parts, gated_rows, modulated_rows
from vdcore.integrations.diffusers.clip import Clip, causal_block, samples_agree
from vdcore.integrations.diffusers.family import Family, Forward, channels_first
from vdcore.integrations.diffusers.fused import Fused
from vdcore.mask import FrameMask


class WanAttention(Fused):
    """Self-attention with one norm across heads and interleaved rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (wan._get_qkv_projections, wan.WanRotaryPosEmbed.forward)

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        if attention_mask is not None or (encoder_hidden_states is not None and attn.add_k_proj is not None):
            return None
        return self.self_or_cross_attention(attn, hidden_states, encoder_hidden_states, None, rotary_emb)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(1, N, 1, D)`` with every angle twice: the host reads one cosine and the other sine."""
        cos, sin = rotary
        return cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]


class SkyReelsAttention(WanAttention):
    """As Wan; for diffusion forcing the host masks blocks of frames causally, by a dense mask of all tokens."""

    RELIES: ClassVar[tuple[Any, ...]] = (skyreels._get_qkv_projections, skyreels.SkyReelsV2RotaryPosEmbed.forward)

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        if attention_mask is None or encoder_hidden_states is not None or self.clip.mask is not None:
            return super().fused(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        block = self.clip.once(causal_block, attention_mask)
        if block is None:
            return None
        blocks = Clip(FrameMask.causal())
        blocks.announce((hidden_states.shape[1] // block, block, 1))
        return output_projection(attn, self.self_attention(attn, hidden_states, rotary_emb, blocks))


class HeliosAttention(Fused):
    """Self-attention over history and clip; history keys may be amplified, which is left to the host's own code."""

    RELIES: ClassVar[tuple[Any, ...]] = (helios._get_qkv_projections, helios.apply_rotary_emb_transposed)

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor | None:
        to_itself = encoder_hidden_states is None
        if attention_mask is not None or (to_itself and attn.is_amplify_history):
            return None
        if to_itself and rotary_emb is not None and not self.clip.once(samples_agree, rotary_emb):
            return None
        return self.self_or_cross_attention(attn, hidden_states, encoder_hidden_states, None, rotary_emb)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From a table ``(B, N, 2 D)``: cosines, then sines, every angle twice."""
        cos, sin = rotary[0].chunk(2, -1)
        return cos[..., 0::2], sin[..., 1::2]


def wan_block(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    if temb.ndim == 4:  # (B, N, 6, C)
        parts = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    else:  # (B, 6, C)
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _block(self, hidden_states, encoder_hidden_states, None, rotary_emb, parts)


def skyreels_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    if temb.ndim == 4:  # (B, 6, N, C)
        parts = (self.scale_shift_table.unsqueeze(2) + temb.float()).unbind(1)
    else:
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _block(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, parts)


def _block(block: Any, x: Tensor, text: Tensor, mask: Tensor | None, rotary_emb: Any, parts: Parts) -> Tensor:
    """The block on rows ``(B, N, C)``, modulated by ``(B, C)`` or ``(B, N, C)``; the host does so in float32."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (y if y.ndim == 2 else y.unsqueeze(1) for y in parts)
    attended = block.attn1(modulated_rows(block.norm1, x, shift, scale), None, mask, rotary_emb)
    x = gated_rows(x, attended, gate)
    normed = block.norm2(x.float()).type_as(x)
    x = x + block.attn2(normed, text, None, None)
    return gated_rows(x, block.ffn(modulated_rows(block.norm3, x, shift_mlp, scale_mlp)), gate_mlp)


FAMILY = Family(
    processors={
        helios.HeliosAttnProcessor: HeliosAttention,
        skyreels.SkyReelsV2AttnProcessor: SkyReelsAttention,
        wan.WanAttnProcessor: WanAttention,
    },
    forwards={
        skyreels.SkyReelsV2TransformerBlock: Forward(skyreels_block, GATED),
        wan.WanTransformerBlock: Forward(wan_block, GATED),
    },
    grids={
        skyreels.SkyReelsV2Transformer3DModel: channels_first,
        wan.WanTransformer3DModel: channels_first,
    },
)
