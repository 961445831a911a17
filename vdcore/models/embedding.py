"""The way in and out of the blocks: patches, timestep, label, text; and back to video."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.models.attention import Context
from vdcore.models.config import VDiTConfig
from vdcore.ops import modulate, patchify, unpatchify


class PatchEmbedding(nn.Module):
    """Video to tokens, the weight as ``torch.nn.Conv3d`` has it."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, *patch))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, T, H, W)`` to ``(B, T/pt, (H/ph)*(W/pw), width)``."""
        return patchify(video, self.weight, self.bias)


class TimestepEmbedding(nn.Module):
    """An MLP on ``[cos(t w_j), sin(t w_j)]``, 128 frequencies from 1 to 1e-4 (DiT)."""

    frequencies = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * self.frequencies, width)
        self.proj = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """``(B,)`` or ``(B, T)`` to ``(B, C)`` or ``(B, T, C)``."""
        exponent = torch.arange(self.frequencies, dtype=torch.float32, device=timestep.device) / self.frequencies
        angle = timestep.float()[..., None] * torch.exp(-math.log(1e4) * exponent)
        wave = torch.cat((angle.cos(), angle.sin()), -1).to(self.up.weight.dtype)
        return self.proj(F.silu(self.up(wave)))


class TextProjection(nn.Module):
    """Text features to the model's width (PixArt-alpha)."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(text_width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.proj(F.gelu(self.up(text), approximate="tanh"))


class FinalLayer(nn.Module):
    """Norm, modulation and the projection of tokens to patches."""

    def __init__(self, config: VDiTConfig) -> None:
        super().__init__()
        self.channels, self.patch = config.channels_out, config.patch
        self.weight = nn.Parameter(torch.zeros(self.channels * math.prod(self.patch), config.width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        single = config.modulation == "single"
        self.modulation = None if single else nn.Linear(config.width, 2 * config.width)
        self.table = nn.Parameter(torch.empty(2, config.width)) if single else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens ``(B, T', S, C)`` to video ``(B, channels, T, H, W)``."""
        if self.table is None:
            assert self.modulation is not None
            shift, scale = self.modulation(context.activated).chunk(2, -1)
        else:
            shift, scale = (self.table + context.condition[..., None, :]).unbind(-2)
        x = modulate(x, context.of_own_frames(shift), context.of_own_frames(scale))
        return unpatchify(x, self.weight, self.bias, channels=self.channels, patch=self.patch, grid=context.grid)
