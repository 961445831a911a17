"""Layers around the temporal attention of U-Nets, read from images ``(..., C, S)`` and written to them.

The hosts permute images to token rows, sometimes more than once, before and after each group of blocks. A matrix
product reads either layout, so the projections of the group do the permuting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vdcore.integrations.swap import is_plain
from vdcore.models.layout import Split
from vdcore.modes import is_differentiated
from vdcore.norm import compute_dtype


def normed_rows_of(linear: Any, norm: Any, x: Tensor, split: Split | None = None) -> Tensor:
    """Group norm over a clip ``(B, T, C, S)``, frames included, then a linear layer: ``(B, T, S, E)``.

    With a ``split`` x is of this rank's frames, and the norm over those of all ranks.

    For one sample in float32 the norm's scale and shift go into the layer's weights, so that x is read twice and never
    written. Weights of half precision would round them, and those of several samples would be copied for every frame.
    """
    wide = x.dtype in (torch.float32, torch.float64)
    if x.shape[0] != 1 or not (wide and _is_group_norm(norm) and _is_product(linear, x)):
        return rows_of(linear, clip_group_norm(norm, x, split))
    scale, shift = (y[0] for y in _scale_and_shift(norm, x, split))  # (C,)
    weight = linear.weight.t()
    bias = shift @ weight + (0 if linear.bias is None else linear.bias)
    per_frame = (weight * scale[:, None]).expand(x.shape[1], -1, -1)
    return torch.baddbmm(bias, x[0].transpose(1, 2), per_frame).unsqueeze(0)


def clip_group_norm(norm: Any, x: Tensor, split: Split | None = None) -> Tensor:
    """Group norm over the frames of a clip as well: ``(B, T, C, S)`` in and out, no frame moved."""
    if not _is_group_norm(norm):
        if split is not None:
            kind = type(norm).__name__
            raise RuntimeError(f"swap_in: a group norm over frames of several ranks must be a plain one, got {kind}")
        return norm(x.transpose(1, 2)).transpose(1, 2)
    scale, shift = _scale_and_shift(norm, x, split)
    return torch.addcmul(shift[:, None, :, None], x.to(shift.dtype), scale[:, None, :, None]).to(x.dtype)


def _is_group_norm(norm: Any) -> bool:
    """A group norm and nothing else, whatever it was when the model was swapped."""
    return type(norm) is nn.GroupNorm and is_plain(norm)


def _scale_and_shift(norm: nn.GroupNorm, x: Tensor, split: Split | None) -> tuple[Tensor, Tensor]:
    """The norm as ``x * scale + shift``, each ``(B, C)``."""
    # Per frame, where the numbers of a group lie together, then over the frames.
    variance, mean = _frame_moments(x, norm.num_groups)  # (B, T, G)
    if split is not None:
        variance, mean = split.all_frames(torch.stack((variance, mean), -1), 1).unbind(-1)
    size = x.shape[2] // norm.num_groups
    variance = variance.mean(1) + mean.var(1, correction=0)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(size, 1)
    shift = -mean.mean(1).repeat_interleave(size, 1) * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return scale, shift


def _frame_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of each frame and group of ``(B, T, C, S)``: ``(B, T, G)``."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or is_differentiated() or torch.compiler.is_compiling():
        return torch.var_mean(x.unflatten(2, (groups, -1)).to(compute_dtype(x.dtype)), (3, 4), correction=0)
    # torch's group norm finds them ten times as fast as var_mean does (1.8 against 17 ms for 21 MB, two threads). Frame
    # by frame its result, which is not needed, stays in the cache; without an eps 1 / rstd**2 is the variance.
    (B, T, C, S), moments = x.shape, []
    for frame in x.contiguous().view(B * T, 1, C, S):
        _, mean, rstd = torch.native_group_norm(frame, None, None, 1, C, S, groups, 0.0)
        moments.append((rstd.pow(-2), mean))
    variance, mean = (torch.cat(found).view(B, T, groups) for found in zip(*moments))
    return variance, mean


def _is_product(linear: Any, x: Tensor) -> bool:
    """The layer is a matrix product in x's dtype, and nothing else."""
    return type(linear) is nn.Linear and is_plain(linear) and not torch.is_autocast_enabled(x.device.type)


def rows_of(linear: Any, x: Tensor) -> Tensor:
    """A linear layer over the channels of ``(..., C, S)``: ``(..., S, E)``, with no transposed copy."""
    if not _is_product(linear, x):
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
    if not _is_product(linear, rows):
        return linear(rows).transpose(-1, -2) + residual
    frames = rows.flatten(0, -3)
    weight = linear.weight.expand(frames.shape[0], -1, -1)
    images = torch.baddbmm(residual.flatten(0, -3), weight, frames.transpose(1, 2))
    if linear.bias is not None:
        images.add_(linear.bias[:, None])
    return images.unflatten(0, rows.shape[:-2])
