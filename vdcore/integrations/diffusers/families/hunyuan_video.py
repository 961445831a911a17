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

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.clip import Keys, keys_unseen, may_look
from vdcore.integrations.diffusers.fused import Call, Fused

registry.grid(
    hunyuan.HunyuanVideoTransformer3DModel,
    hunyuan15.HunyuanVideo15Transformer3DModel,
    motif.MotifVideoTransformer3DModel,
    axes=(2, 3, 4),
)


@registry.processor(hunyuan.HunyuanVideoAttnProcessor2_0)
class JointAttention(Fused):
    """Joint attention with a norm per head and interleaved rotation of the clip."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, hunyuan.HunyuanVideoRotaryPosEmbed.forward)
    SERVES = "video_attention"

    def fused(self, attn: Any, call: Call) -> Any:
        if call.text is None:
            return None
        keys = self.text_keys(call.mask, call.x.shape[1], call.text.shape[1])
        return None if isinstance(keys, str) else self.joint_attention(attn, call, text_keys=keys)

    def text_keys(self, mask: Tensor | None, tokens: int, text: int) -> Keys | str | None:
        """Valid text tokens of a mask over clip and text; the reason if the mask is of another kind."""
        if mask is None:
            return None
        if mask.shape[-1] != tokens + text or mask.shape[:-1].numel() != mask.shape[0]:
            return "the attention mask is not one of the clip and the text"
        if may_look(mask):
            keys = self.clip.valid_keys(mask)
            if isinstance(keys, Keys):
                hidden = keys.order is not None and "the attention mask hides keys that are not the last ones"
                return hidden or Keys(keys.lengths - tokens)
            return keys
        of_clip = mask[..., :tokens]
        visible = of_clip if of_clip.dtype == torch.bool else of_clip == 0
        torch._assert_async(visible.all(), "swap_in: an attention mask over clip and text must show all of the clip")
        return keys_unseen(mask[..., tokens:])

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, D)``, every angle twice."""
        cos, sin = rotary
        return cos[:, 0::2], sin[:, 0::2]


@registry.processor(hunyuan15.HunyuanVideo15AttnProcessor2_0)
class HunyuanVideo15Attention(JointAttention):
    """The mask ``(B, L)`` is of the text; the host makes one of all pairs from it in every call."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, hunyuan15.HunyuanVideo15RotaryPosEmbed.forward)

    def text_keys(self, mask: Tensor | None, tokens: int, text: int) -> Keys | str | None:
        if mask is None or mask.dtype != torch.bool or mask.shape[-1] != text:
            return "the attention mask is not one of the text"
        return self.clip.valid_keys(mask)


@registry.processor(motif.MotifVideoAttnProcessor2_0)
class MotifVideoAttention(JointAttention):
    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb, motif.MotifVideoRotaryPosEmbed.forward)
