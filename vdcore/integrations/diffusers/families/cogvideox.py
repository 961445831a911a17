"""CogVideoX, ConsisID and EasyAnimate: joint attention over a text and the clip, text first."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
from torch import Tensor

from vdcore.integrations.diffusers._attention import as_rope
from vdcore.integrations.diffusers._clip import pairs_agree
from vdcore.integrations.diffusers._fused import Fused
from vdcore.rope import Rope


class TextFirstAttention(Fused):
    """Joint attention with a norm per head and interleaved rotation of the clip, by a table of the caller's."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb,)
    SERVES = "video_attention"

    def serve(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        known = self.why_not_now() is None and attention_mask is None and not attn.is_cross_attention
        turns = image_rotary_emb is None or all(self.clip.once(pairs_agree, x) for x in image_rotary_emb)
        if not known or not turns or encoder_hidden_states is None:
            return self.as_host(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        def rope(q: Tensor) -> Rope | None:
            if image_rotary_emb is None:
                return None
            cos, sin = image_rotary_emb  # (N, D), every angle twice
            return as_rope(cos[:, 0::2], sin[:, 0::2], q, self.clip.split(q.shape[1]))

        return self.joint_attention(attn, hidden_states, encoder_hidden_states, rope, text_first=True)
