"""Chunk after chunk without end: a chunk-causal model with the keys and values of the past in a ring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.diffusion.process import Process
from vdcore.diffusion.sampling import sample
from vdcore.mask import FrameMask


def horizon(seconds: float, fps: float, chunk: int, temporal_stride: int = 1, sink: int = 0) -> FrameMask:
    """A chunk-causal mask that remembers at least so many seconds of video.

    Args:
        seconds: of the past that the first frame of a chunk sees; rounded up to whole chunks.
        fps: frames per second of the video.
        chunk: latent frames that are denoised together.
        temporal_stride: video frames per latent frame.
        sink: first frames that are never forgotten.
    """
    frames = FrameMask.seconds(seconds, fps, temporal_stride).past
    return FrameMask(past=math.ceil((frames or 0) / chunk), future=0, chunk=chunk, sink=sink)


@torch.no_grad()
def roll(
    model: Any,
    process: Process,
    noises: Iterable[Tensor],
    steps: int,
    cache: Any = None,
    *,
    generator: torch.Generator | None = None,
    average: int = 1,
    fresh: float = 0.0,
    **conditions: Any,
) -> Iterator[Tensor]:
    """Denoises chunk after chunk; each sees the clean chunks before it, as far back as the model's mask reaches.

    The keys and values of past frames lie in the model's ring, so that time and memory per chunk are constant. After a
    chunk is denoised, one more pass over the clean chunk writes its keys and values (``keep=True``).

    Args:
        model: with ``new_cache(batch, height, width)``, and called as :class:`~vdcore.models.VDiT` is.
        noises: one ``(B, C, chunk, H, W)`` for every chunk.
        steps: of the scheduler, for every chunk.
        cache: to go on from; ``None``: a new one.
        generator, average, fresh: as :func:`sample` takes them.
    """
    for noise in noises:
        if cache is None:
            cache = model.new_cache(len(noise), *noise.shape[3:])
        given: dict[str, Any] = {"generator": generator, "average": average, "fresh": fresh, **conditions}
        clean = sample(partial(model, cache=cache), process, noise, steps, **given)
        still = process.model_timestep(clean.new_full((len(clean),), process.clean))
        model(clean, still, cache=cache, keep=True, **conditions)
        yield clean


def self_forcing(
    model: Any,
    process: Process,
    noises: Iterable[Tensor],
    steps: int,
    loss: Callable[[Tensor, int], Tensor | None],
    cache: Any = None,
    **conditions: Any,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rolls and learns from what it drew (Huang et al. 2025, Self Forcing), backward through one chunk at a time.

    A chunk is drawn as :func:`roll` draws it, without gradients, and its last step is computed once more with them:
    the clean video that it predicts is the chunk, which ``loss`` judges and the cache keeps. Gradients reach the
    weights through that step alone: not through earlier steps, and not through the cache, whose keys and values are
    constants. So memory does not grow with the number of chunks.

    Args:
        model, process, noises, steps, cache, conditions: as :func:`roll` takes them.
        loss: of a chunk ``(B, C, chunk, H, W)`` and its number, a scalar; None: nothing is learned from it.

    Yields:
        Each chunk and its loss, after backward: gradients add up in the parameters' ``.grad``.
    """
    for i, noise in enumerate(noises):
        if cache is None:
            cache = model.new_cache(len(noise), *noise.shape[3:])
        last: list[Tensor] = []
        sample(partial(_remembered, model, cache, last), process, noise, steps, **conditions)
        noisy, timestep = last
        with torch.enable_grad():
            output = model(noisy, timestep, cache=cache, **conditions)
            clean = process.clean_and_noise(output, noisy, timestep)[0]
            value = loss(clean, i)
            if value is not None:
                value.backward()
        clean, value = clean.detach(), None if value is None else value.detach()
        del output
        with torch.no_grad():
            still = process.model_timestep(clean.new_full((len(clean),), process.clean))
            model(clean, still, cache=cache, keep=True, **conditions)
        yield clean, value


@torch.no_grad()
def roll_by_recomputing(
    model: Any, process: Process, noises: Iterable[Tensor], steps: int, **conditions: Any
) -> Iterator[Tensor]:
    """What :func:`roll` computes, without a cache: every step runs all frames so far, the past held clean."""
    past: Tensor | None = None
    for noise in noises:
        chunk = noise.shape[2]
        if past is None:
            clean = sample(model, process, noise, steps, **conditions)
            past = clean
        else:
            known = torch.cat((past, torch.zeros_like(noise)), 2)
            held = torch.arange(known.shape[2], device=known.device) < past.shape[2]
            whole = torch.cat((torch.zeros_like(past), noise), 2)
            past = sample(model, process, whole, steps, held=held, known=known, **conditions)
            clean = past[:, :, -chunk:]
        yield clean


def _remembered(model: Any, cache: Any, last: list[Tensor], video: Tensor, timestep: Tensor, **given: Any) -> Tensor:
    """The model's output; ``last`` holds what it was made of."""
    last[:] = video, timestep
    return model(video, timestep, cache=cache, **given)
