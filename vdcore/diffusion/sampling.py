"""From noise to video: all frames at one timestep, frames held clean, or a timestep of its own for every frame."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vdcore.diffusion import schedulers
from vdcore.diffusion.process import Denoise, Process, hold_timesteps, per_frame

RENEWED = ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler")  # whose videos are alpha x + sigma e after every step


class Sampler(Protocol):
    """Draws a clip of frames at the given positions; what is held comes out as it went in.

    Args:
        positions: ``(T,)``, of the frames in the video.
        held: ``(T,)`` bool, frames that are known; ``None``: none.
        known: ``(B, C, T, H, W)``; only its held frames are read.
    """

    def __call__(self, positions: Tensor, held: Tensor | None = None, known: Tensor | None = None) -> Tensor: ...


@torch.no_grad()
def sample(
    denoise: Denoise,
    process: Process,
    noise: Tensor,
    steps: int,
    *,
    held: Tensor | None = None,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    average: int = 1,
    fresh: float = 0.0,
    on_step: Callable[[int], None] | None = None,
    **conditions: Any,
) -> Tensor:
    """Denoises a clip by the scheduler's own steps; frames that are held stay clean throughout, as a condition.

    Gives what the loop of a diffusers pipeline gives: noise as strong as the scheduler starts from, the model's input
    scaled by it, the model called twice in a step of second order.

    Args:
        denoise: called with ``(B,)`` timesteps, or ``(B, T)`` where frames are held.
        noise: ``(B, C, T, H, W)``, standard normal.
        steps: of the scheduler.
        held: ``(T,)`` or ``(B, T)`` bool, frames taken from ``known``.
        known: ``(B, C, T, H, W)``.
        generator: for schedulers that add noise at every step; others do not get it.
        average: so many last predictions of the clean video have their mean returned in place of the last step's
            video. A small model errs as much at little noise as at more of it: the mean errs less than the last.
        fresh: share of the noise's variance that every step but the last replaces by new noise, from ``generator``, in
            which the model's errors so far drown. Of the plain steps of flow matching and DDIM only.
        on_step: called with the number of timesteps that are done.
        conditions: passed on to the denoiser.
    """
    scheduler = process.scheduler
    if (held is None) != (known is None):
        raise ValueError("sample: held and known must be given together, got one of them")
    if known is not None and known.shape != noise.shape:
        raise ValueError(f"sample: known must be {tuple(noise.shape)}, as noise, got {tuple(known.shape)}")
    if held is not None:
        held = held.expand(len(noise), noise.shape[2])

    def hold(video: Tensor) -> Tensor:
        return video if held is None else torch.where(per_frame(held), known, video)  # type: ignore[arg-type]

    steps_at = schedulers.begin(scheduler, steps, process.mu, noise.device)
    if not 1 <= average <= len(steps_at):
        raise ValueError(f"sample: average must be from 1 to {len(steps_at)}, the calls of the model, got {average}")
    if (fresh and type(scheduler).__name__ not in RENEWED) or not 0 <= fresh <= 1:
        expected = f"from 0 to 1, and 0 but with {' and '.join(RENEWED)}"
        raise ValueError(f"sample: fresh must be {expected}, got {fresh} with {type(scheduler).__name__}")
    clean: list[Tensor] = []
    video = hold(schedulers.first_video(scheduler, noise))
    for i, t in enumerate(steps_at):
        timestep = t.to(torch.float32).expand(len(video))
        if held is not None:
            timestep = hold_timesteps(timestep, held, process.clean)
        given = hold(schedulers.model_input(scheduler, video, t))
        output = denoise(given, process.model_timestep(timestep), **conditions)
        guess = output
        if fresh or average > 1:
            guess = schedulers.clipped(scheduler, process.clean_and_noise(output, given, timestep)[0])
        if average > 1 and i >= len(steps_at) - average:
            clean.append(guess)
        output = process.output_for_scheduler(output, given, timestep)
        video = schedulers.step(scheduler, output, t, video, generator)
        if fresh and i + 1 < len(steps_at):
            video = _renewed(process, video, guess, steps_at[i + 1].float().expand(len(video)), fresh, generator)
        video = hold(video)
        if on_step is not None:
            on_step(i + 1)
    return hold(torch.stack(clean).mean(0)) if clean else video


def _renewed(
    process: Process, video: Tensor, clean: Tensor, timestep: Tensor, share: float, generator: torch.Generator | None
) -> Tensor:
    """The video ``alpha x + sigma e`` of a clean guess, with a share of the noise's variance drawn anew."""
    alpha, sigma = map(per_frame, process.level(timestep))
    device = video.device if generator is None else generator.device
    noise = torch.randn(video.shape, generator=generator, device=device, dtype=video.dtype).to(video.device)
    kept = video - alpha * clean
    return alpha * clean + (1 - share) ** 0.5 * kept + share**0.5 * sigma * noise


def timesteps(process: Process, steps: int) -> Tensor:
    """The scheduler's different timesteps, of which there are ``steps`` as a rule, and the one without noise after
    them: ``(steps + 1,)`` float32, falling. Of steps that call the model twice it is the first call's."""
    at = schedulers.begin(process.scheduler, steps, process.mu)[:: process.scheduler.order]
    return torch.cat((at.float().cpu().unique().flip(0), torch.tensor([process.clean])))


def pyramid(process: Process, steps: int, frames: int, lag: int) -> Tensor:
    """Timesteps in which every frame is ``lag`` steps behind the one before it, for :func:`sample_frames`.

    ``(steps + lag*(frames-1) + 1, frames)``. ``lag=0`` denoises all frames together, ``lag=steps`` one after another;
    between them the near future is clearer than the far one (Chen et al. 2024, Ruhe et al. 2024).
    """
    if lag < 0:
        raise ValueError(f"pyramid: lag must be at least 0, got {lag}")
    levels = timesteps(process, steps)
    last = len(levels) - 1
    rows = torch.arange(last + lag * (frames - 1) + 1)[:, None]
    return levels[(rows - lag * torch.arange(frames)).clamp(0, last)]


@torch.no_grad()
def sample_frames(
    denoise: Denoise, process: Process, noise: Tensor, levels: Tensor, video: Tensor | None = None, **conditions: Any
) -> Tensor:
    """Denoises frames along timesteps of their own, by deterministic steps (DDIM's, or the flow's Euler step).

    Args:
        noise: ``(B, C, T, H, W)``.
        levels: ``(K + 1, T)`` timesteps, never rising along the first axis: row ``k`` to row ``k + 1`` is a
            step. A frame whose column is ``process.clean`` from the start is a condition.
        video: where to begin if not from pure noise, with frames as noisy as the first row says.
        conditions: passed on to the denoiser.
    """
    if levels.ndim != 2 or levels.shape[1] != noise.shape[2]:
        raise ValueError(f"sample_frames: levels must be (K + 1, T = {noise.shape[2]}), got {tuple(levels.shape)}")
    if (levels.diff(dim=0) > 0).any():
        raise ValueError("sample_frames: levels must never rise from row to row, got some that do")
    levels = levels.to(noise.device)
    video = noise if video is None else video
    for now, then in pairwise(levels):
        now, then = now.expand(len(video), -1), then.expand(len(video), -1)
        output = denoise(video, process.model_timestep(now), **conditions)
        video = process.move(output, video, now, then)
    return video


def guided(denoise: Denoise, scale: float, **pairs: tuple[Tensor, Tensor]) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022) in one batch: ``uncond + scale * (cond - uncond)``.

    Args:
        scale: 1 is the conditional prediction alone.
        pairs: conditions of the denoiser, each with the value that stands for none: ``label=(label, null)``.
    """

    def both(video: Tensor, timestep: Tensor, /, **conditions: Any) -> Tensor:
        joined = {name: torch.cat(pair) for name, pair in pairs.items()}
        cond, uncond = denoise(video.repeat(2, 1, 1, 1, 1), torch.cat((timestep,) * 2), **joined, **conditions).chunk(2)
        return uncond + scale * (cond - uncond)

    return both


def make_sampler(
    denoise: Denoise,
    process: Process,
    shape: tuple[int, int, int, int],
    steps: int,
    *,
    generator: torch.Generator | None = None,
    average: int = 1,
    fresh: float = 0.0,
    device: torch.device | str | None = None,
    tell_positions: bool = False,
    **conditions: Any,
) -> Sampler:
    """A :class:`Sampler` by :func:`sample`: what splicing and keyframes are made of.

    Args:
        shape: ``(B, C, H, W)``.
        generator: of the noise, on the CPU or the device.
        average, fresh: as :func:`sample` takes them.
        tell_positions: pass ``positions`` on to the denoiser, counted from the clip's first frame, so that a clip far
            into a video looks like those of training. Frames need not be neighbors then.
    """
    B, C, H, W = shape

    def draw(positions: Tensor, held: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        made_on = generator.device if generator is not None else device
        noise = torch.randn(B, C, len(positions), H, W, generator=generator, device=made_on).to(device)
        told: dict[str, Any] = {"positions": (positions - positions[0]).to(device)} if tell_positions else {}
        given: dict[str, Any] = {"held": held, "known": known, "generator": generator}
        given |= {"average": average, "fresh": fresh}
        return sample(denoise, process, noise, steps, **given, **told, **conditions)

    return draw
