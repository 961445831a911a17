"""Convolution over video that never looks ahead, so that a clip may come in pieces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stream = dict[nn.Module, Any]  # what each layer remembers of the chunks before: one dict per clip, empty at first


class CausalConv3d(nn.Module):
    """A 3D convolution whose result at frame ``t`` depends on frames up to ``t * stride`` only.

    After MAGVIT-v2 (Yu et al. 2024). ``kt - 1`` frames stand before the first one, as copies of it; rows and columns
    are padded by zeros on both sides. ``T`` frames become ``ceil(T / stride)``, so ``1 + 4 k`` become
    ``1 + 2 k`` with stride 2, and an image is a clip of one frame.

    With a stream, chunks give what the whole clip gives: the layer keeps the frames that the next result still needs.

    Args:
        in_channels, out_channels: of the video.
        kernel: (kt, kh, kw), or one odd size for all.
        stride: (st, sh, sw), or one for all.
        causal: False: frames are padded on both sides by copies of the first and last one, chunk for chunk: what a
            convolution that looks ahead has to do, and whose seams it leaves.

    Raises:
        ValueError: if kernel sizes are even, or have fewer frames than the stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"CausalConv3d: kernel must be odd, got {kernel}")
        if kernel[0] < (stride if isinstance(stride, int) else stride[0]):
            raise ValueError(f"CausalConv3d: kernel must have at least stride = {stride} frames, got {kernel}")
        self.causal = causal
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """``(B, C, T, H, W)`` to ``(B, out_channels, T', H', W')``; with a stream T' may be 0."""
        kt, st = self.conv.kernel_size[0], self.conv.stride[0]
        if not self.causal:
            begun = stream is not None and self in stream
            if stream is not None:
                stream[self] = None  # nothing is kept
            left = kt // 2 - (st - 1) * begun  # results stay st frames apart across the border
            return self.conv(torch.cat((*[x[:, :, :1]] * left, x, *[x[:, :, -1:]] * (kt // 2)), 2))
        before = None if stream is None else stream.get(self)
        x = torch.cat((*([x[:, :, :1]] * (kt - 1) if before is None else [before]), x), 2)
        results = max((x.shape[2] - kt) // st + 1, 0)
        if stream is not None:
            stream[self] = x[:, :, results * st :].clone()  # a view would keep the whole chunk alive
        if results == 0:
            height, width = (-(-n // s) for n, s in zip(x.shape[3:], self.conv.stride[1:]))
            return x.new_empty(len(x), self.conv.out_channels, 0, height, width)
        return self.conv(x)


class CausalUpsample(nn.Module):
    """Frames, rows and columns twice, but the first frame once, so ``1 + k`` become ``1 + 2 k``; then a convolution."""

    def __init__(self, channels: int, out_channels: int, *, causal: bool = True) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, out_channels, causal=causal)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        first = stream is None or self not in stream
        if stream is not None:
            stream[self] = True
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x[:, :, 1:] if first else x, stream)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each pixel: a norm over frames would let the future in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight
