"""Layers around the temporal attention of U-Nets, read from images ``(..., C, S)`` and written to them.

The hosts permute images to token rows, sometimes more than once, before and after each group of blocks. A matrix
product reads either layout, so the projections of the group do the permuting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vdcore.integrations.diffusers._attention import is_plain
from vdcore.norm import compute_dtype


def clip_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm over the frames of a clip as well: ``(B, T, C, S)`` in and out, no frame moved."""
    if not is_plain(norm):
        return norm(x.transpose(1, 2)).transpose(1, 2)
    B, T, C, S = x.shape
    groups = x.unflatten(2, (norm.num_groups, -1))  # (B, T, G, C/G, S)
    dtype = compute_dtype(x.dtype)
    variance, mean = torch.var_mean(groups.to(dtype), (1, 3, 4), correction=0)  # (B, G)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(C // norm.num_groups, 1)  # (B, C)
    shift = -mean.repeat_interleave(C // norm.num_groups, 1) * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return torch.addcmul(shift[:, None, :, None], x.to(dtype), scale[:, None, :, None]).to(x.dtype)


def rows_of(linear: Any, x: Tensor) -> Tensor:
    """A linear layer over the channels of ``(..., C, S)``: ``(..., S, E)``, with no transposed copy."""
    if type(linear) is not nn.Linear or not is_plain(linear) or torch.is_autocast_enabled(x.device.type):
        return linear(x.transpose(-1, -2))
    frames = x.flatten(0, -3)
    weight = linear.weight.t().expand(frames.shape[0], -1, -1)
    if linear.bias is None:
        y = torch.bmm(frames.transpose(1, 2), weight)
    else:
        y = torch.baddbmm(linear.bias, frames.transpose(1, 2), weight)
    return y.unflatten(0, x.shape[:-2])


def add_images_of(linear: Any, rows: Tensor, residual: Tensor) -> Tensor:
    """``residual + linear(rows)``, from rows ``(..., S, E)`` to images ``(..., C, S)``, with no transposed copy."""
    if type(linear) is not nn.Linear or not is_plain(linear) or torch.is_autocast_enabled(rows.device.type):
        return linear(rows).transpose(-1, -2) + residual
    frames = rows.flatten(0, -3)
    weight = linear.weight.expand(frames.shape[0], -1, -1)
    if linear.bias is not None:
        residual = residual + linear.bias[:, None]
    return torch.baddbmm(residual.flatten(0, -3), weight, frames.transpose(1, 2)).unflatten(0, rows.shape[:-2])
