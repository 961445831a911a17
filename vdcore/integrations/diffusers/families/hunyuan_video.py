"""HunyuanVideo, HunyuanVideo 1.5 and Motif-Video: joint attention over the clip and a padded text, text last.

The hosts concatenate both and attend under a mask of keys, in HunyuanVideo 1.5 one of all pairs. Here the text is a
second view and the mask a length. Rows of padding come out as 0: nothing that is valid ever sees them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
import torch
from diffusers.models.transformers import transformer_hunyuan_video as hunyuan
from diffusers.models.transformers import transformer_hunyuan_video15 as hunyuan15
from diffusers.models.transformers import transformer_motif_video as motif
from torch import Tensor

from vdcore.integrations.diffusers.family import Family, channels_first
from vdcore.integrations.diffusers.fused import Fused


class JointAttention(Fused):
    """Joint attention with a norm per head and interleaved rotation of the clip."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, hunyuan.HunyuanVideoRotaryPosEmbed.forward)
    SERVES = "video_attention"

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if encoder_hidden_states is None:
            return None
        lengths = self.padding(attention_mask, hidden_states.shape[1], encoder_hidden_states.shape[1])
        if isinstance(lengths, str):
            return None
        return self.joint_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb, text_lengths=lengths)

    def padding(self, mask: Tensor | None, tokens: int, text: int) -> Tensor | str | None:
        return self.text_lengths(mask, tokens, text)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, D)``, every angle twice."""
        cos, sin = rotary
        return cos[:, 0::2], sin[:, 0::2]


class HunyuanVideo15Attention(JointAttention):
    """The mask ``(B, L)`` is of the text; the host makes one of all pairs from it in every call."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, hunyuan15.HunyuanVideo15RotaryPosEmbed.forward)

    def padding(self, mask: Tensor | None, tokens: int, text: int) -> Tensor | str | None:
        if mask is None or mask.dtype != torch.bool or mask.shape[-1] != text:
            return "the attention mask is not one of the text"
        return self.clip.key_lengths(mask)


class MotifVideoAttention(JointAttention):
    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, motif.MotifVideoRotaryPosEmbed.forward)


FAMILY = Family(
    processors={
        hunyuan.HunyuanVideoAttnProcessor2_0: JointAttention,
        hunyuan15.HunyuanVideo15AttnProcessor2_0: HunyuanVideo15Attention,
        motif.MotifVideoAttnProcessor2_0: MotifVideoAttention,
    },
    grids={
        hunyuan.HunyuanVideoTransformer3DModel: channels_first,
        hunyuan15.HunyuanVideo15Transformer3DModel: channels_first,
        motif.MotifVideoTransformer3DModel: channels_first,
    },
)
