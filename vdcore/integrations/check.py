"""Whether a swap changes what comes out: results of a host beside those of the same model swapped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdcore.video.files import contact_sheet


@dataclass(frozen=True)
class Seen:
    """What a viewer sees of the difference of two videos, whose values lie in [0, 1].

    Args:
        psnr: decibels, ``-10 log10`` of the mean squared difference; of all values, inf where they are equal.
        worst: that of the frame with the least.
        frame: its number, over all clips one after another.
        changed: share of the values that differ once rounded to 8 bits.
        levels: by how many of 255 at most.
    """

    psnr: float
    worst: float
    frame: int
    changed: float
    levels: int

    def __str__(self) -> str:
        if not self.levels:
            return f"video: PSNR {self.psnr:.1f} dB, the same in 8 bits"
        return (
            f"video: PSNR {self.psnr:.1f} dB, {self.worst:.1f} in its worst frame ({self.frame}); "
            f"{100 * self.changed:.2g} % of its values differ in 8 bits, by at most {self.levels} of 255"
        )


@dataclass(frozen=True)
class Check:
    """A host beside the same model swapped.

    Args:
        largest: absolute difference of their results.
        relative: the norm of the difference over that of the host's result.
        host_seconds, seconds: of one call.
        host_apart: largest difference of two calls of the host.
        seen: where the result is a video in [0, 1]; None: it is none.
        videos: the host's and vdcore's, clips ``(C, T, H, W)``; empty: the result is none.
    """

    largest: float
    relative: float
    host_seconds: float
    seconds: float
    host_apart: float = 0.0
    seen: Seen | None = None
    videos: tuple[list[Tensor], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        text = (
            f"largest difference {self.largest:.2e}, relative {self.relative:.2e}; "
            f"host {self.host_seconds:.3g} s, vdcore {self.seconds:.3g} s ({self.host_seconds / self.seconds:.2f}x)"
        )
        if self.host_apart:
            text += f"; the host differs from itself by {self.host_apart:.2e}"
        return text if self.seen is None else f"{text}\n{self.seen}"

    def show(self, path: str | Path) -> Path:
        """A PNG of frames of the first clip: the host's, vdcore's, and their difference, many times itself.

        Raises:
            ValueError: if the result was no video.
            ImportError: without the extra ``video``.
        """
        if not self.videos:
            raise ValueError("check: show needs a video, frames of values in [0, 1], and the result was none")
        host, ours = (clips[0].float() for clips in self.videos)
        apart = (host - ours).abs()
        largest = float(apart.max())
        times = 10 ** math.floor(-math.log10(largest)) if 0 < largest < 1 else 1
        labels = ["host", "vdcore", f"difference x {times:,}"]
        return contact_sheet(path, [host, ours, apart * times], labels=labels)


@dataclass(frozen=True)
class Twice:
    """A second call's result, and its seconds.

    Args:
        values: what tensors, arrays and images it holds, in float64.
        clips: where it is a video.
        apart: the largest difference from the first call's.
    """

    values: list[Tensor]
    clips: list[Tensor]
    seconds: float
    apart: float


def twice(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> Twice:
    """Calls a model twice, from the same state of random numbers."""
    first, (result, seconds) = _values(_timed(model, args, inputs)[0]), _timed(model, args, inputs)
    values = _values(result)
    return Twice(values, clips_of(result), seconds, _differences(first, values)[0])


def compare(host: Twice, ours: Twice) -> Check:
    largest, relative = _differences(host.values, ours.values)
    videos = (host.clips, ours.clips) if host.clips and ours.clips else ()
    seen = _seen(*videos) if videos else None
    return Check(largest, relative, host.seconds, ours.seconds, host.apart, seen, videos)


def clips_of(result: Any) -> list[Tensor]:
    """Clips ``(C, T, H, W)`` in [0, 1] of a pipeline's result; none where it is no video.

    As pipelines of diffusers return them: ``(B, T, H, W, C)`` in numpy, ``(B, T, C, H, W)`` in torch, lists of images.
    """
    frames = getattr(result, "frames", result[0] if isinstance(result, tuple) and result else result)
    if isinstance(frames, (Tensor, np.ndarray)):
        clips = list(frames) if frames.ndim == 5 else [frames]
    elif isinstance(frames, (list, tuple)) and frames:
        clips = [frames] if hasattr(frames[0], "__array_interface__") and np.ndim(frames[0]) == 3 else list(frames)
    else:
        return []
    found = [_clip(x) for x in clips]
    return [x for x in found if x is not None] if all(x is not None for x in found) else []


def _clip(frames: Any) -> Tensor | None:
    """``(C, T, H, W)`` of one clip's frames."""
    if isinstance(frames, (list, tuple)):
        if not frames or not all(hasattr(x, "__array_interface__") and np.ndim(x) == 3 for x in frames):
            return None
        frames = np.stack([np.asarray(x) for x in frames])
    if not isinstance(frames, (Tensor, np.ndarray)) or frames.ndim != 4:
        return None
    x = torch.as_tensor(frames).detach().cpu()
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if x.shape[1] not in (1, 3) or isinstance(frames, np.ndarray):
        x = x.movedim(-1, 1)
    if x.shape[1] not in (1, 3) or not x.numel() or x.min() < 0 or x.max() > 1:
        return None
    return x.transpose(0, 1)


def _seen(host: list[Tensor], ours: list[Tensor]) -> Seen:
    apart = [(x.double() - y.double()).square().mean((0, 2, 3)) for x, y in zip(host, ours)]
    each = torch.cat(apart)
    weights = torch.cat([torch.full_like(e, x[:, 0].numel()) for e, x in zip(apart, host)])
    levels = [(x.mul(255).round() - y.mul(255).round()).abs() for x, y in zip(host, ours)]
    values = sum(x.numel() for x in levels)
    return Seen(
        _decibels(float((each * weights).sum() / weights.sum())),
        _decibels(float(each.max())),
        int(each.argmax()),
        sum(int(x.count_nonzero()) for x in levels) / values,
        max(int(x.max()) for x in levels),
    )


def _decibels(square: float) -> float:
    return -10 * math.log10(square) if square > 0 else math.inf


def _timed(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, float]:
    """A call's result and its seconds; random numbers are where they were before it."""
    generators = [(x, x.get_state()) for x in _leaves((args, inputs)) if isinstance(x, torch.Generator)]
    with torch.random.fork_rng(), torch.no_grad():
        _synchronize()
        start = perf_counter()
        result = model(*args, **inputs)
        _synchronize()
        seconds = perf_counter() - start
    for generator, state in generators:
        generator.set_state(state)
    return result, seconds


def _values(result: Any) -> list[Tensor]:
    found = [
        torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x)).detach().cpu().double()
        for x in _leaves(result)
        if not isinstance(x, torch.Generator)
    ]
    if not found:
        raise TypeError(f"check: model must return tensors, arrays or images, got {type(result).__name__}")
    return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _leaves(x: Any, within: tuple[Any, ...] = ()) -> Iterator[Any]:
    """What a result holds, or arguments: through mappings, sequences and objects, each once on the way down."""
    if isinstance(x, (Tensor, np.ndarray, torch.Generator)) or hasattr(x, "__array_interface__"):
        yield x
    elif any(x is outer for outer in within):
        return
    elif isinstance(x, (Mapping, list, tuple)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from _leaves(value, (*within, x))
    elif hasattr(x, "__dict__"):
        yield from _leaves(vars(x), (*within, x))


def _differences(host: list[Tensor], ours: list[Tensor]) -> tuple[float, float]:
    if [x.shape for x in host] != [x.shape for x in ours]:
        shapes = [[tuple(x.shape) for x in xs] for xs in (host, ours)]
        raise RuntimeError(f"check: the results have other shapes: {shapes[0]} of the host, {shapes[1]} of vdcore")
    apart = [(x - y).flatten() for x, y in zip(host, ours)]
    largest = float(torch.cat(apart).abs().max()) if any(x.numel() for x in apart) else 0.0
    norm = sum(float(x.square().sum()) for x in host) ** 0.5
    return largest, sum(float(x.square().sum()) for x in apart) ** 0.5 / norm if norm else largest
