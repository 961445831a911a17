"""CogVideoX, ConsisID and EasyAnimate: joint attention over a text and the clip, text first.

ConsisID's perceivers, attention to the tokens of a face, are written into the forward of a module.
"""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.models.embeddings as embeddings
import torch
from diffusers.models import transformers
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers import consisid_transformer_3d as consisid
from diffusers.models.transformers.transformer_easyanimate import EasyAnimateAttnProcessor2_0
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import cross, heads
from vdcore.integrations.diffusers.clip import pairs_agree
from vdcore.integrations.diffusers.fused import Call, Fused
from vdcore.integrations.swap import IN_MODE, in_function_mode

registry.grid(transformers.CogVideoXTransformer3DModel, transformers.ConsisIDTransformer3DModel, axes=(1, 3, 4))
registry.grid(transformers.EasyAnimateTransformer3DModel, axes=(2, 3, 4))


@registry.processor(CogVideoXAttnProcessor2_0, EasyAnimateAttnProcessor2_0)
class TextFirstAttention(Fused):
    """Joint attention with a norm per head and interleaved rotation of the clip, by a table of the caller's."""

    RELIES: ClassVar[tuple[Any, ...]] = (embeddings.apply_rotary_emb,)
    SERVES = "video_attention"

    def fused(self, attn: Any, call: Call) -> Any:
        if call.mask is not None or attn.is_cross_attention or call.text is None:
            return None
        looked = self.clip.ranks is not None  # at once for all blocks, where a mesh takes the tables apart
        if call.rotary is not None and not (looked or all(self.clip.once(pairs_agree, x) for x in call.rotary)):
            return None
        return self.joint_attention(attn, call, text_first=True)

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, D)``, every angle twice."""
        cos, sin = rotary
        return cos[:, 0::2], sin[:, 0::2]


@registry.forward(consisid.PerceiverAttention, serves="cross_attention")
def perceiver(self: Any, image_embeds: Tensor, latents: Tensor) -> Tensor | str:
    """Latents ``(B, L, C)`` attend to the image's tokens ``(B, M, C)`` and to one another."""
    if in_function_mode():
        return IN_MODE
    latents = self.norm2(latents)
    return _attend(self, latents, torch.cat((self.norm1(image_embeds), latents), -2))


@registry.forward(consisid.PerceiverCrossAttention, serves="cross_attention")
def perceiver_cross(self: Any, image_embeds: Tensor, hidden_states: Tensor) -> Tensor | str:
    """Tokens of the clip ``(B, N, C)`` attend to those of the face ``(B, M, E)``."""
    if in_function_mode():
        return IN_MODE
    return _attend(self, self.norm2(hidden_states), self.norm1(image_embeds))


def _attend(module: Any, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (heads(y, module.heads) for y in (module.to_q(x), *module.to_kv(context).chunk(2, -1)))
    return module.to_out(cross(q, k, v).flatten(-2))
