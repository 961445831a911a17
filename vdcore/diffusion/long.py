"""Videos longer than a clip, from a denoiser of clips: memory for a clip, whatever the length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vdcore.diffusion.process import Denoise
from vdcore.diffusion.sampling import Sampler


def _check_chunks(what: str, frames: int, chunk: int, overlap: int) -> None:
    if frames < 1:
        raise ValueError(f"{what}: frames must be at least 1, got {frames}")
    if not 0 <= overlap < chunk:
        raise ValueError(f"{what}: overlap must be at least 0 and below the chunk of {chunk} frames, got {overlap}")


def splice(sampler: Sampler, frames: int, chunk: int, overlap: int) -> Iterator[Tensor]:
    """Latent splicing: chunk after chunk, each with the last ``overlap`` frames of the one before it held clean.

    Yields the new frames of every chunk, ``(B, C, n, H, W)``, ``frames`` in all: 64 frames in chunks of 8 with an
    overlap of 2 are 8, then nine times 6, then 2, cropped. Only a chunk is in memory at a time.
    """
    _check_chunks("splice", frames, chunk, overlap)
    held = torch.arange(chunk) < overlap
    clip = sampler(torch.arange(chunk))
    yield clip[:, :, :frames]
    for start in range(chunk - overlap, frames - overlap, chunk - overlap):
        known = torch.zeros_like(clip)
        known[:, :, :overlap] = clip[:, :, chunk - overlap :]
        clip = sampler(torch.arange(start, start + chunk), *((held, known) if overlap else ()))
        yield clip[:, :, overlap : frames - start]


def chunk_starts(frames: int, chunk: int, overlap: int) -> list[int]:
    """First frames of chunks that cover a video; the last chunk ends with it, and overlaps more if it must."""
    _check_chunks("chunk_starts", frames, chunk, overlap)
    last = max(frames - chunk, 0)
    return sorted({min(start, last) for start in range(0, last + chunk - overlap, chunk - overlap)})


def blended(denoise: Denoise, chunk: int, overlap: int) -> Denoise:
    """A denoiser of any length: it denoises overlapping chunks and cross-fades their predictions at every step.

    The weights are a ramp of ``overlap`` frames at either end of a chunk (temporal co-denoising: Bar-Tal et al. 2023,
    Wang et al. 2023). Unlike :func:`splice` no chunk comes first, but all noisy frames are in memory, and a chunk sees
    no further than itself in a step. Frames that only one chunk covers are its own.
    """
    _check_chunks("blended", 1, chunk, overlap)

    def whole(video: Tensor, timestep: Tensor, /, **conditions: Any) -> Tensor:
        frames = video.shape[2]
        total, weights = torch.zeros_like(video), video.new_zeros(frames)
        for start in chunk_starts(frames, chunk, overlap):
            part = slice(start, min(start + chunk, frames))
            clip = video[:, :, part]
            output = denoise(clip, timestep if timestep.ndim == 1 else timestep[:, part], **conditions)
            weight = _ramp(clip.shape[2], overlap).to(video)
            total[:, :, part] += output * weight[:, None, None]
            weights[part] += weight
        return total / weights[:, None, None]

    return whole


def _ramp(frames: int, overlap: int) -> Tensor:
    """1 inside, and towards either end ``k / (overlap + 1)`` at the k-th frame: never 0."""
    inside = torch.arange(1, frames + 1, dtype=torch.float32)
    return (torch.minimum(inside, inside.flip(0)) / (overlap + 1)).clamp(max=1)


def keyframes(sampler: Sampler, frames: int, every: int, keys: int | None = None) -> Tensor:
    """Every ``every``-th frame first, then the frames between two of them with both held clean.

    Args:
        sampler: is told the frames' positions: keyframes lie ``every`` apart.
        frames: length of the video ``(B, C, frames, H, W)`` that is returned.
        keys: keyframes in a clip; ``None``: all in one. More follow by :func:`splice`, with an overlap of one keyframe.
    """
    if frames < 1 or every < 1:
        raise ValueError(f"keyframes: frames and every must be at least 1, got {frames} and {every}")
    if keys is not None and keys < 2:
        raise ValueError(f"keyframes: keys must be at least 2, got {keys}")
    gaps = -(-(frames - 1) // every)

    def far(positions: Tensor, held: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        return sampler(positions * every, held, known)

    key = torch.cat(tuple(splice(far, gaps + 1, keys or gaps + 1, overlap=min(gaps, 1))), 2)
    if every == 1 or not gaps:
        return key
    B, C, _, H, W = key.shape
    video = key.new_empty(B, C, gaps * every + 1, H, W)
    held = torch.zeros(every + 1, dtype=torch.bool)
    held[[0, -1]] = True
    for gap in range(gaps):
        known = key.new_zeros(B, C, every + 1, H, W)
        known[:, :, [0, -1]] = key[:, :, gap : gap + 2]
        between = slice(gap * every, gap * every + every + 1)
        video[:, :, between] = sampler(torch.arange(between.start, between.stop), held, known)
    return video[:, :, :frames]


def interleaved(denoise: Denoise, every: int, scale: float = 1.0) -> Denoise:
    """A denoiser of ``every`` times the length: frames ``i, i + every, i + 2 every, ...`` make a clip, for every ``i``.

    Every clip spans the whole video, so distant frames see one another at the cost of a clip; alternate with
    :func:`blended`, which sees neighbors, for instance by timestep.

    Args:
        scale: of the positions that the denoiser is told. 1 tells the truth, frames that lie ``every`` apart;
            ``1 / every`` squeezes the video into the range of positions of a clip.
    """
    if every < 1:
        raise ValueError(f"interleaved: every must be at least 1, got {every}")

    def whole(video: Tensor, timestep: Tensor, /, **conditions: Any) -> Tensor:
        output = torch.empty_like(video)
        for first in range(min(every, video.shape[2])):
            part = slice(first, None, every)
            positions = torch.arange(video.shape[2], device=video.device)[part] * scale
            step = timestep if timestep.ndim == 1 else timestep[:, part]
            output[:, :, part] = denoise(video[:, :, part], step, positions=positions, **conditions)
        return output

    return whole
