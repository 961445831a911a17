"""ConsisID's perceivers: attention to the tokens of a face, written into the forward of a module."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import consisid_transformer_3d as consisid
from torch import Tensor, nn

from vdcore.integrations.diffusers._attention import cross, heads


def perceiver(self: Any, image_embeds: Tensor, latents: Tensor) -> Tensor:
    """Latents ``(B, L, C)`` attend to the image's tokens ``(B, M, C)`` and to one another."""
    latents = self.norm2(latents)
    return _attend(self, latents, torch.cat((self.norm1(image_embeds), latents), -2))


def perceiver_cross(self: Any, image_embeds: Tensor, hidden_states: Tensor) -> Tensor:
    """Tokens of the clip ``(B, N, C)`` attend to those of the face ``(B, M, E)``."""
    return _attend(self, self.norm2(hidden_states), self.norm1(image_embeds))


def _attend(module: Any, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (heads(y, module.heads) for y in (module.to_q(x), *module.to_kv(context).chunk(2, -1)))
    return module.to_out(cross(q, k, v).flatten(-2))


# What serves each class, and with which operator.
HOSTS: dict[type[nn.Module], tuple[Any, ...]] = {
    consisid.PerceiverAttention: (perceiver, "cross_attention"),
    consisid.PerceiverCrossAttention: (perceiver_cross, "cross_attention"),
}
