"""Wan and SkyReels V2, which share their attention and blocks; Helios, which rotates in another layout."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers import transformer_helios as helios
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.models.transformers import transformer_wan as wan
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import output_projection
from vdcore.integrations.diffusers.blocks.modulation import GATED, transformer_block
from vdcore.integrations.diffusers.clip import Clip, causal_block, samples_agree
from vdcore.integrations.diffusers.fused import Call, Fused
from vdcore.mask import FrameMask

registry.grid(skyreels.SkyReelsV2Transformer3DModel, wan.WanTransformer3DModel, axes=(2, 3, 4))


@registry.processor(wan.WanAttnProcessor)
class WanAttention(Fused):
    """Self-attention with one norm across heads and interleaved rotation; cross attention to text."""

    RELIES: ClassVar[tuple[Any, ...]] = (wan._get_qkv_projections, wan.WanRotaryPosEmbed.forward)

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        if call.mask is not None or (call.text is not None and attn.add_k_proj is not None):
            return None
        return self.self_or_cross_attention(attn, call)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(1, N, 1, D)`` with every angle twice: the host reads one cosine and the other sine."""
        cos, sin = rotary
        return cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]


@registry.processor(skyreels.SkyReelsV2AttnProcessor)
class SkyReelsAttention(WanAttention):
    """As Wan; for diffusion forcing the host masks blocks of frames causally, by a dense mask of all tokens."""

    RELIES: ClassVar[tuple[Any, ...]] = (skyreels._get_qkv_projections, skyreels.SkyReelsV2RotaryPosEmbed.forward)

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        if call.mask is None or call.text is not None or self.clip.mask is not None:
            return super().fused(attn, call)
        block = self.clip.once(causal_block, call.mask)
        if block is None:
            return None
        blocks = Clip(FrameMask.causal(), frames=call.x.shape[1] // block)
        return output_projection(attn, self.self_attention(attn, call.x, call.rotary, blocks))


@registry.processor(helios.HeliosAttnProcessor)
class HeliosAttention(Fused):
    """Self-attention over history and clip; history keys may be amplified, which is left to the host's own code."""

    RELIES: ClassVar[tuple[Any, ...]] = (helios._get_qkv_projections, helios.apply_rotary_emb_transposed)

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        if call.mask is not None or (call.text is None and attn.is_amplify_history):
            return None
        if call.text is None and call.rotary is not None and not self.clip.once(samples_agree, call.rotary):
            return None
        return self.self_or_cross_attention(attn, call)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From a table ``(B, N, 2 D)``: cosines, then sines, every angle twice."""
        cos, sin = rotary[0].chunk(2, -1)
        return cos[..., 0::2], sin[..., 1::2]


@registry.forward(skyreels.SkyReelsV2TransformerBlock, wan.WanTransformerBlock, serves=GATED)
def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Modulated in float32, as the host does, by sample ``(B, 6, C)``; by token Wan's timesteps are ``(B, N, 6, C)``,
    and those of SkyReels ``(B, 6, N, C)``."""
    table, axis = self.scale_shift_table, 1
    if temb.ndim == 4:
        axis = 1 if isinstance(self, skyreels.SkyReelsV2TransformerBlock) else 2
        table = table.unsqueeze(2 if axis == 1 else 0)
    parts = (table + temb.float()).unbind(axis)  # (B, C) or (B, N, C)
    parts = tuple(y if y.ndim == 2 else y.unsqueeze(1) for y in parts)

    def attend(rows: Tensor) -> Tensor:
        return self.attn1(rows, None, attention_mask, rotary_emb)

    def cross(x: Tensor) -> Tensor:
        return self.attn2(self.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)

    return transformer_block(hidden_states, parts, (self.norm1, self.norm3), attend, cross, self.ffn)
