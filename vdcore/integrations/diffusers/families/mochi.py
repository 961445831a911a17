"""Mochi: joint attention over the clip and the valid tokens of a text, and the pooling of that text.

The host loops over the samples, and finds the valid tokens of each. Here they are a length, and padding is 0 too.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import MochiAttentionPool
from torch import Tensor, nn

from vdcore.integrations.diffusers._attention import as_rope, cross, heads
from vdcore.integrations.diffusers._clip import padding_lengths
from vdcore.integrations.diffusers._fused import Fused
from vdcore.integrations.diffusers._swap import host_forward
from vdcore.rope import Rope


class MochiAttention(Fused):
    """Joint attention with a norm per head and a learned interleaved rotation of every head."""

    SERVES = "video_attention"

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        lengths = self.clip.once(marked_lengths, attention_mask)
        if isinstance(lengths, str) or self.why_not_now() is not None:
            return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        def rope(q: Tensor) -> Rope | None:
            if image_rotary_emb is None:
                return None
            cos, sin = image_rotary_emb  # (N, H, D/2)
            return as_rope(cos, sin, q, self.clip.split(q.shape[1]))

        return self.joint_attention(attn, hidden_states, encoder_hidden_states, rope, text_lengths=lengths)


def marked_lengths(mask: Tensor) -> Any:
    """As :func:`padding_lengths`, of a mask whose valid tokens are those that are not 0."""
    return padding_lengths(mask != 0)


def pool(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """One token ``(B, E)`` of a text ``(B, L, C)``: the mean of its valid tokens attends to itself and to them."""
    lengths = marked_lengths(mask)
    if isinstance(lengths, str):
        return host_forward(self, lengths, x, mask)
    mean = self.pool_tokens(x, mask, keepdim=True)
    k, v = self.to_kv(torch.cat((mean, x), 1)).chunk(2, -1)
    q, k, v = (heads(y, self.num_attention_heads) for y in (self.to_q(mean), k, v))
    pooled = cross(q, k, v, lengths=None if lengths is None else lengths + 1)
    return self.to_out(pooled.flatten(1))


# What serves each class, with which operator, and what else of the host it relies on.
HOSTS: dict[type[nn.Module], tuple[Any, ...]] = {
    MochiAttentionPool: (pool, "cross_attention", MochiAttentionPool.pool_tokens),
}
