"""Patches as a reshape, a permute and a linear layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vdcore_bench.peers.eager import eager_and_compiled, in_float32


def _patches_linear(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, C, T, H, W = video.shape
    pt, ph, pw = weight.shape[2:]
    patches = video.reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(patches.reshape(B, T // pt, (H // ph) * (W // pw), C * pt * ph * pw), weight.flatten(1), bias)


def _linear_patches(tokens: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: Any, grid: Any) -> Tensor:
    y = F.linear(tokens, weight, bias).reshape(tokens.shape[0], *grid, *patch, channels)
    sizes = [n * p for n, p in zip(grid, patch)]
    return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(tokens.shape[0], channels, *sizes)


eager_and_compiled(
    "linear", "patchify", {"reshape + linear": _patches_linear, "in float32": in_float32(_patches_linear)}
)
eager_and_compiled(
    "linear", "unpatchify", {"linear + permute": _linear_patches, "in float32": in_float32(_linear_patches)}
)
