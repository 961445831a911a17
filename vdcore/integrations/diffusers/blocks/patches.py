"""Patch embeddings: convolutions whose stride is their kernel, in the modules that flatten what they return."""

from __future__ import annotations

from typing import Any

from diffusers.models import embeddings
from diffusers.models.transformers import (
    transformer_easyanimate,
    transformer_hunyuan_video,
    transformer_hunyuan_video15,
    transformer_motif_video,
    transformer_sana_video,
    transformer_skyreels_v2,
    transformer_wan,
)
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers import registry
from vdcore.integrations.swap import Change, changed_forward, has_plain_parameters, host_type, is_of, known_as

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)

# The name of the convolution in each module that has one, and uses its result by flattening it only.
HOSTS: dict[type[nn.Module], str] = {
    embeddings.PatchEmbed: "proj",
    embeddings.CogVideoXPatchEmbed: "proj",
    transformer_easyanimate.EasyAnimateTransformer3DModel: "proj",
    transformer_hunyuan_video.HunyuanVideoPatchEmbed: "proj",
    transformer_hunyuan_video15.HunyuanVideo15PatchEmbed: "proj",
    transformer_motif_video.MotifVideoPatchEmbed: "proj",
    transformer_sana_video.SanaVideoTransformer3DModel: "patch_embedding",
    transformer_skyreels_v2.SkyReelsV2Transformer3DModel: "patch_embedding",
    transformer_wan.WanTransformer3DModel: "patch_embedding",
}

# Hosts that make the tokens contiguous before their blocks.
CONTIGUOUS = (transformer_wan.WanTransformer3DModel,)


def find(model: nn.Module) -> dict[nn.Module, Change | str]:
    """The patch embeddings of a model, each with the change that serves it, or the reason why none does."""
    found: dict[nn.Module, Change | str] = {}
    for module in model.modules():
        host = known_as(host_type(module), HOSTS)
        conv = getattr(module, HOSTS[host], None) if isinstance(host, type) else None
        if isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            serve = forward_of_contiguous if host in CONTIGUOUS else forward
            found[conv] = why_not(conv) or Change.of_forward(conv, serve, "patchify")
    return found


def why_not(conv: Any) -> str | None:
    if not (is_of(conv, *CONVOLUTIONS) and is_of(conv, *CONVOLUTIONS, method="_conv_forward")):
        return f"{type(conv).__name__} is not torch's convolution"
    if conv.stride != conv.kernel_size or conv.groups != 1 or set(conv.dilation) != {1}:
        return "its stride is not its kernel"
    if conv.padding in ("same", "valid") or any(conv.padding):
        return "it pads"
    return changed_forward(conv)


def forward(self: Any, video: Tensor) -> Tensor | str:
    """The convolution; its result is a view of token rows."""
    if not has_plain_parameters(self):
        return "its weight is for the module alone"
    dims = len(self.kernel_size)
    if video.ndim != dims + 2 or any(n % p for n, p in zip(video.shape[2:], self.kernel_size)):
        return "a size that its patch does not divide"
    weight = self.weight
    if dims == 2:  # a batch of frames
        video, weight = video.unsqueeze(2), weight.unsqueeze(2)
    tokens = vdcore.patchify(video, weight, self.bias)  # (B, T', H'*W', E)
    grid = video.shape[3] // weight.shape[3], video.shape[4] // weight.shape[4]
    out = tokens.unflatten(2, grid).permute(0, 4, 1, 2, 3)  # (B, E, T', H', W')
    return out.squeeze(2) if dims == 2 else out


def forward_of_contiguous(self: Any, video: Tensor) -> Tensor | str:
    """As :func:`forward`; one sample in the host's layout.

    Flattened, a view of one sample has another stride of the batch, which "contiguous" lets be: compiled for the first
    block, the code would not do for the second.
    """
    out = forward(self, video)
    return out if isinstance(out, str) or len(out) > 1 else out.contiguous()


@registry.forward(
    transformer_hunyuan_video.HunyuanVideoPatchEmbed,
    transformer_hunyuan_video15.HunyuanVideo15PatchEmbed,
    transformer_motif_video.MotifVideoPatchEmbed,
    serves="patchify",
)
def tokens_of(self: Any, hidden_states: Tensor) -> Tensor:
    """Tokens ``(B, N, E)`` of a clip, whose strides are those of a contiguous tensor also where B is 1."""
    rows = self.proj(hidden_states).flatten(2).transpose(1, 2)
    return rows if len(rows) > 1 else rows[0].unsqueeze(0)
