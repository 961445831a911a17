"""Kandinsky 5: full attention with a norm per head in float32 and interleaved rotation; cross attention to text."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_kandinsky as kandinsky
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import cross, heads, qk_norm, video
from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    gated_rows,
    modulated,
    modulated_rows,
    transformer_block,
)
from vdcore.integrations.diffusers.fused import Call, Fused

registry.grid(kandinsky.Kandinsky5Transformer3DModel, axes=(1, 2, 3))


@registry.processor(kandinsky.Kandinsky5AttnProcessor)
class KandinskyAttention(Fused):
    RELIES: ClassVar[tuple[Any, ...]] = (kandinsky.Kandinsky5RoPE3D.forward, kandinsky.Kandinsky5RoPE1D.forward)

    @classmethod
    def is_video(cls, name: str) -> bool:
        return "text_transformer_blocks" not in name

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        # The host rounds what it rotates to bfloat16: in a wider model that is its result, and it does it itself.
        rounds = call.rotary is not None and call.x.dtype != torch.bfloat16
        if "sparse_params" in call.others or rounds or call.x.ndim != 3:
            return None
        source = call.x if call.text is None else call.text
        q = heads(attn.to_query(call.x), attn.num_heads)
        k, v = (heads(projection(source), attn.num_heads) for projection in (attn.to_key, attn.to_value))
        eps = torch.finfo(torch.float32).eps  # of a norm that runs in float32 and names none
        q, k, norm = qk_norm(q, k, attn.query_norm, attn.key_norm, default_eps=eps)
        if call.text is None:
            out = video(self.clip, q, k, v, norm, self.rope(call.rotary, q))
        else:
            out = cross(q, k, v, norm=norm)
        return attn.out_layer(out.flatten(-2))

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From rotations ``(B or 1, N, 1, D/2, 2, 2)``, the same for all samples: ``[[cos, -sin], [sin, cos]]``."""
        cos, sin = rotary[0, :, 0, :, :, 0].unbind(-1)  # (N, D/2)
        return cos, sin


@registry.forward(kandinsky.Kandinsky5TransformerEncoderBlock, serves=GATED)
def text_block(self: Any, x: Tensor, time_embed: Tensor, rope: Any) -> Tensor | str:
    """Modulated by ``(B, C)`` in float32, as the host does."""
    if x.ndim != 3 or time_embed.ndim != 2:
        return NEITHER
    attend, norms = partial(self.self_attention, rotary_emb=rope), (self.self_attention_norm, self.feed_forward_norm)
    return transformer_block(x, self.text_modulation(time_embed).chunk(6, -1), norms, attend, None, self.feed_forward)


@registry.forward(kandinsky.Kandinsky5TransformerDecoderBlock, serves=GATED)
def video_block(
    self: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Any, sparse_params: Any
) -> Tensor | str:
    """As the block of the text, with attention to it."""
    x = visual_embed
    if x.ndim != 3 or time_embed.ndim != 2:
        return NEITHER
    parts = self.visual_modulation(time_embed).chunk(9, -1)
    shift, scale, gate = parts[:3]
    rows = modulated_rows(self.self_attention_norm, x, shift, scale)
    x = gated_rows(x, self.self_attention(rows, rotary_emb=rope, sparse_params=sparse_params), gate)
    shift, scale, gate = parts[3:6]
    rows = modulated_rows(self.cross_attention_norm, x, shift, scale)
    x = gated_rows(x, self.cross_attention(rows, encoder_hidden_states=text_embed), gate)
    shift, scale, gate = parts[6:]
    return gated_rows(x, self.feed_forward(modulated_rows(self.feed_forward_norm, x, shift, scale)), gate)


@registry.forward(kandinsky.Kandinsky5OutLayer, serves="modulate")
def out_layer(self: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor) -> Tensor | str:
    """The last norm, projection and patches ``(B, T, H, W, p*p*p*C)`` as video, channels last."""
    if visual_embed.ndim != 5 or time_embed.ndim != 2:
        return "modulation that is not one of a clip by sample"
    shift, scale = self.modulation(time_embed).chunk(2, -1)
    x = modulated(self.norm, visual_embed.flatten(2, 3), shift, scale).view(visual_embed.shape)
    B, T, H, W, _ = x.shape
    p, q, r = self.patch_size
    patches = self.out_layer(x).view(B, T, H, W, -1, p, q, r)
    return patches.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * p, H * q, W * r, -1)
