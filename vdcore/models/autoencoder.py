"""A small temporal causal autoencoder: clips of 1 + 4 k frames to 1 + k latent frames, whole or in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.models.causal_conv import CausalConv3d, CausalUpsample, ChannelNorm, Stream


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a :class:`CausalAutoencoder`.

    Args:
        channels: of the video.
        latent_channels: of the latent video.
        widths: channels of each level; each level after the first halves frames, rows and columns.
        causal: False: convolutions look ahead; for comparison only.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (32, 64, 96)
    causal: bool = True

    @property
    def factor(self) -> int:
        """Frames, rows and columns of video per latent one."""
        return 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, channels: int, out_channels: int, causal: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ChannelNorm(channels), ChannelNorm(out_channels)])
        self.convs = nn.ModuleList(
            [CausalConv3d(n, out_channels, causal=causal) for n in (channels, out_channels)],
        )
        self.skip = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.silu(norm(y)), stream)
        return self.skip(x) + y


class Head(nn.Module):
    """Norm and the last convolution."""

    def __init__(self, channels: int, out_channels: int, causal: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = CausalConv3d(channels, out_channels, causal=causal)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return self.conv(F.silu(self.norm(x)), stream)


class CausalAutoencoder(nn.Module):
    """Encoder and decoder of causal convolutions and norms per pixel (after MAGVIT-v2 and Wan's VAE).

    A frame's latent depends on this frame and those before it, and the first frame stands alone: an image is a clip of
    one frame, and a clip of any length is coded in chunks with what the convolutions remember, at the memory of one
    chunk. Deterministic, without the sampling of a VAE.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()) -> None:
        super().__init__()
        self.config = config
        widths, causal = config.widths, config.causal
        encoder: list[nn.Module] = [CausalConv3d(config.channels, widths[0], causal=causal)]
        decoder: list[nn.Module] = [CausalConv3d(config.latent_channels, widths[-1], causal=causal)]
        for fine, coarse in pairwise(widths):
            encoder += [ResidualBlock(fine, fine, causal), CausalConv3d(fine, coarse, stride=2, causal=causal)]
        encoder += [ResidualBlock(widths[-1], widths[-1], causal), Head(widths[-1], config.latent_channels, causal)]
        decoder.append(ResidualBlock(widths[-1], widths[-1], causal))
        for fine, coarse in reversed(list(pairwise(widths))):
            decoder += [CausalUpsample(coarse, fine, causal=causal), ResidualBlock(fine, fine, causal)]
        decoder.append(Head(widths[0], config.channels, causal))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)

    def forward(self, video: Tensor) -> Tensor:
        """The video as it comes back, ``(B, C, 1 + 4 k, H, W)``."""
        return self.decode(self.encode(video))

    def encode(self, video: Tensor, *, stream: Stream | None = None, chunk: int | None = None) -> Tensor:
        """Video to latents.

        Args:
            video: ``(B, C, T, H, W)``: ``T = 1 + 4 k``, or with a stream that has begun ``T = 4 k``; H and W are
                multiples of 4. (4 is ``config.factor``.)
            stream: a dict, empty at the beginning of a clip, that makes this call continue the one before.
            chunk: work through the video in chunks of so many frames, a multiple of 4, after its first frame.

        Returns:
            ``(B, latent_channels, 1 + k or k, H/4, W/4)``.

        Raises:
            ValueError: if a size is not such a multiple.
        """
        factor, begun = self.config.factor, bool(stream)
        self._check("video", video, self.config.channels)
        for name, size in (("height", video.shape[3]), ("width", video.shape[4])):
            if size % factor:
                raise ValueError(f"encode: the {name} of video must be a multiple of {factor}, got {size}")
        if video.shape[2] % factor != (0 if begun else 1):
            expected = f"a multiple of {factor}" if begun else f"1 + a multiple of {factor}"
            raise ValueError(f"encode: video must have {expected} frames, got {video.shape[2]}")
        if chunk is not None and (chunk < 1 or chunk % factor):
            raise ValueError(f"encode: chunk must be a multiple of {factor} frames, got {chunk}")
        return self._run(self.encoder, video, stream, chunk)

    def decode(self, latent: Tensor, *, stream: Stream | None = None, chunk: int | None = None) -> Tensor:
        """Latents to video.

        Args:
            latent: ``(B, latent_channels, T, h, w)``.
            stream: as in :meth:`encode`; another dict than the encoder's.
            chunk: latent frames to work on at a time, after the first.

        Returns:
            ``(B, C, 1 + 4 (T - 1), 4 h, 4 w)``; where a stream goes on, ``4 T`` frames.

        Raises:
            ValueError: if ``latent`` has another shape, or ``chunk`` is not positive.
        """
        self._check("latent", latent, self.config.latent_channels)
        if chunk is not None and chunk < 1:
            raise ValueError(f"decode: chunk must be at least 1 frame, got {chunk}")
        return self._run(self.decoder, latent, stream, chunk)

    @staticmethod
    def _check(name: str, x: Tensor, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or x.shape[2] == 0:
            shape = tuple(x.shape)
            raise ValueError(f"CausalAutoencoder: {name} must be (B, {channels}, T, H, W) with T > 0, got {shape}")

    @staticmethod
    def _run(layers: nn.ModuleList, x: Tensor, stream: Stream | None, chunk: int | None) -> Tensor:
        if chunk is not None:
            stream = {} if stream is None else stream
        pieces = [x] if chunk is None else _pieces(x, chunk, first=0 if stream else 1)
        results = []
        for piece in pieces:
            for layer in layers:
                piece = layer(piece, stream)
            results.append(piece)
        return results[0] if len(results) == 1 else torch.cat(results, 2)


def _pieces(x: Tensor, chunk: int, first: int) -> list[Tensor]:
    """The first frame of a clip alone, then chunks; the last may be shorter."""
    sizes = [first] if first else []
    left = x.shape[2] - first
    sizes += [chunk] * (left // chunk) + ([left % chunk] if left % chunk else [])
    return list(x.split(sizes, 2))
