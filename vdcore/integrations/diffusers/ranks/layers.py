"""Layers that count frames, or mix them otherwise than by attention, on a rank's frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.integrations.diffusers.blocks.images import clip_group_norm
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.swap import SHARED, host_type, is_plain
from vdcore.mask import FrameMask
from vdcore.models.layout import Split
from vdcore.parallel.halo import halo_of, key_frames


def own_tokens(x: Tensor, split: Split, dim: int) -> Tensor:
    """Of what stands for all tokens of a clip, frame by frame, those of this rank's frames."""
    start, size = split.own
    return x.narrow(dim, start * split.sizes[1], size * split.sizes[1])


# ---- Wan ----


def wan_rope(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables ``(1, N_r, 1, D)`` of a rank's frames ``(B, C, T_r, H, W)``, which are not the first ones."""
    (frames, rows, columns), sizes = self.patch_size, hidden_states.shape
    split = getattr(self, SHARED).shared(sizes[2] // frames, (sizes[3] // rows) * (sizes[4] // columns))
    whole = hidden_states[:, :, :1].expand(-1, -1, split.sizes[0] * frames, -1, -1)
    host: Any = host_type(self).forward
    cos, sin = host(self, whole)
    return own_tokens(cos, split, 1), own_tokens(sin, split, 1)


# ---- CogVideoX ----


def cogvideox_patches(self: Any, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
    """Text and patches ``(B, L + N_r, E)`` of a rank's frames ``(B, T_r, C, H, W)``, with the positions of these."""
    host: Any = host_type(self).forward
    names = ("patch_size", "patch_size_t", "text_proj", "proj")
    positions = {"use_positional_embeddings": False, "use_learned_positional_embeddings": False}
    embeds = host(
        SimpleNamespace(**{name: getattr(self, name) for name in names}, **positions), text_embeds, image_embeds
    )
    if not (self.use_positional_embeddings or self.use_learned_positional_embeddings):
        return embeds
    L, (rows, columns) = text_embeds.shape[1], image_embeds.shape[-2:]
    resized = (self.sample_height, self.sample_width) != (rows, columns)
    if self.use_learned_positional_embeddings and resized:
        raise ValueError(
            f"swap_in: image_embeds must be of {self.sample_height} rows and {self.sample_width} columns for learned "
            f"positions, got {rows} and {columns}"
        )
    tokens = (embeds.shape[1] - L) // image_embeds.shape[1]
    split = getattr(self, SHARED).shared(image_embeds.shape[1], tokens)
    before = (split.sizes[0] - 1) * self.temporal_compression_ratio + 1  # the autoencoder
    known = self.pos_embedding
    if resized or self.sample_frames != before:
        known = self._get_positional_embeddings(rows, columns, before, device=embeds.device)
    known = known.to(embeds.dtype)
    of_text, of_clip = known.split([L, known.shape[1] - L], 1)
    return embeds + torch.cat((of_text, own_tokens(of_clip, split, 1)), 1)


# ---- U-Nets ----


def temporal_resnet(self: Any, input_tensor: Tensor, temb: Tensor | None) -> Tensor | str:
    """SVD's convolutions over neighboring frames, and group norms over all frames, on ``(B, C, T_r, H, W)``."""
    if is_observed(m for m in self.modules() if m is not self and not isinstance(m, nn.Conv3d)):
        return OBSERVED
    B, C, T, H, W = input_tensor.shape
    split = getattr(self, SHARED).shared(T, H * W)
    x = _convolved(self.conv1, self.nonlinearity(_normed(self.norm1, input_tensor, split)), split)
    if self.time_emb_proj is not None:
        x = x + self.time_emb_proj(self.nonlinearity(temb)).transpose(1, 2)[..., None, None]
    x = self.dropout(self.nonlinearity(_normed(self.norm2, x, split)))
    x = _convolved(self.conv2, x, split)
    shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
    return shortcut + x


def _normed(norm: nn.GroupNorm, x: Tensor, split: Split) -> Tensor:
    """Group norm of ``(B, C, T_r, H, W)`` over the frames of all ranks."""
    frames = x.transpose(1, 2)  # as they lie in memory
    out = clip_group_norm(norm, frames.flatten(3), split)
    return out.view(frames.shape).transpose(1, 2)


def _convolved(conv: Any, x: Tensor, split: Split) -> Tensor:
    """A convolution over frames, of three, on ``(B, C, T_r, H, W)``; the frame on either side is a neighbor's."""
    (start, size), T = split.own, split.sizes[0]
    before, after = int(start > 0), int(start + size < T)
    halo = halo_of(FrameMask.symmetric(1), T, split.peers)
    (frames,) = key_frames(halo, x.transpose(1, 2))
    frames = frames[:, halo.at(start) - before :].transpose(1, 2)
    if type(conv) is nn.Conv3d and is_plain(conv):
        frames = F.pad(frames, (0, 0, 0, 0, 1 - before, 1 - after))
        return F.conv3d(frames, conv.weight, conv.bias)
    return conv(frames)[:, :, before : before + size]
