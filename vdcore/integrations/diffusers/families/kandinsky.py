"""Kandinsky 5: full attention with a norm per head in float32 and interleaved rotation; cross attention to text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.transformers import transformer_kandinsky as kandinsky
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope, cross, heads, qk_norm, video
from vdcore.integrations.diffusers._fused import Fused
from vdcore.rope import Rope


class KandinskyAttention(Fused):
    RELIES: ClassVar[tuple[Any, ...]] = (kandinsky.Kandinsky5RoPE3D.forward, kandinsky.Kandinsky5RoPE1D.forward)

    @classmethod
    def is_video(cls, name: str) -> bool:
        return "text_transformer_blocks" not in name

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor:
        # The host rounds what it rotates to bfloat16: in a wider model that is its result, and it does it itself.
        rounds = rotary_emb is not None and hidden_states.dtype != torch.bfloat16
        if self.why_not_now() is not None or sparse_params is not None or rounds or hidden_states.ndim != 3:
            return self.as_host(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = heads(attn.to_query(hidden_states), attn.num_heads)
        k, v = (heads(projection(source), attn.num_heads) for projection in (attn.to_key, attn.to_value))
        eps = torch.finfo(torch.float32).eps  # of a norm that runs in float32 and names none
        q, k, norm = qk_norm(q, k, attn.query_norm, attn.key_norm, default_eps=eps)
        if encoder_hidden_states is None:
            out = video(self.clip, q, k, v, norm, self.rope(rotary_emb, q))
        else:
            out = cross(q, k, v, norm=norm)
        return attn.out_layer(out.flatten(-2))

    def rope(self, rotations: Tensor | None, q: Tensor) -> Rope | None:
        """From rotations ``(B or 1, N, 1, D/2, 2, 2)``, the same for all samples: ``[[cos, -sin], [sin, cos]]``."""
        if rotations is None:
            return None
        columns = rotations[0, :, 0, :, :, 0]  # (N, D/2, 2)
        return as_rope(columns[..., 0], columns[..., 1], q, self.clip.split(q.shape[1]))
