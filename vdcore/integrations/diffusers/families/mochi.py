"""Mochi: joint attention over the clip and the valid tokens of a text, and the pooling of that text.

The host loops over the samples, and finds the valid tokens of each. Here they are a length, and padding is 0 too.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.embeddings import MochiAttentionPool
from diffusers.models.transformers import transformer_mochi as mochi
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import cross, heads
from vdcore.integrations.diffusers.blocks.modulation import modulated_rows
from vdcore.integrations.diffusers.clip import Keys, keys_unseen, look_at_keys, may_look
from vdcore.integrations.diffusers.fused import Call, Fused
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.swap import IN_MODE, in_function_mode, is_of, is_plain

registry.grid(mochi.MochiTransformer3DModel, axes=(2, 3, 4))


@registry.processor(MochiAttnProcessor2_0)
class MochiAttention(Fused):
    """Joint attention with a norm per head and a learned interleaved rotation of every head."""

    SERVES = "video_attention"

    def fused(self, attn: Any, call: Call) -> Any:
        if call.mask is None:
            return None
        keys = self.clip.once(marked_keys, call.mask) if may_look(call.mask) else marked_keys(call.mask)
        # What a valid token gets, the host gives to the first ones, wherever the mask has them.
        return None if isinstance(keys, str) else self.joint_attention(attn, call, text_keys=keys, packed=True)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        return rotary  # (N, H, D/2)


def marked_keys(mask: Tensor) -> Keys | str | None:
    """As :meth:`Clip.valid_keys`, of a mask whose valid tokens are those that are not 0."""
    return look_at_keys(mask != 0) if may_look(mask) else keys_unseen(mask != 0)


@registry.forward(MochiAttentionPool, serves="cross_attention", relies=(MochiAttentionPool.pool_tokens,))
def pool(self: Any, x: Tensor, mask: Tensor) -> Tensor | str:
    """One token ``(B, E)`` of a text ``(B, L, C)``: the mean of its valid tokens attends to itself and to them."""
    if in_function_mode() or is_observed(self.children()):
        return IN_MODE if in_function_mode() else OBSERVED
    keys = marked_keys(mask)
    if isinstance(keys, str):
        return keys
    mean = self.pool_tokens(x, mask, keepdim=True)
    if keys is not None:
        x = keys.sort(x)
    k, v = self.to_kv(torch.cat((mean, x), 1)).chunk(2, -1)
    q, k, v = (heads(y, self.num_attention_heads) for y in (self.to_q(mean), k, v))
    pooled = cross(q, k, v, lengths=None if keys is None else keys.lengths + 1)
    return self.to_out(pooled.flatten(1))


@registry.forward(mochi.MochiRMSNormZero, serves="modulate")
def norm_zero(self: Any, hidden_states: Tensor, emb: Tensor) -> Any:
    scale, gate, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(4, 1)
    normed = modulated_rows(self.norm, hidden_states, torch.zeros_like(scale), scale)
    return normed, gate, scale_mlp, gate_mlp


@registry.forward(mochi.MochiLayerNormContinuous, serves="modulate")
def norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor | str:
    if not (is_of(self.norm, mochi.MochiModulatedRMSNorm) and is_plain(self.norm)):
        return "its norm is another, or has hooks"
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    return modulated_rows(self.norm.norm, x, torch.zeros_like(scale), scale)
