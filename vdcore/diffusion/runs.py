"""A training run in a folder, that can be interrupted and gone on with; videos out of a trained model."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.diffusion.data import Source, source_of
from vdcore.diffusion.long import splice
from vdcore.diffusion.rolling import roll
from vdcore.diffusion.sampling import make_sampler, sample
from vdcore.diffusion.training import Recipe, Trained, Trainer, process_for
from vdcore.extras import need
from vdcore.parallel.gradients import total

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHECKPOINT, LOSSES = "checkpoint.safetensors", "losses.jsonl"
# Of the sampler. The default model errs by 0.017 of the range where the noise is 0.03 of it, and by 0.029 where it is
# 0.15: plain steps carry these errors on, which differ from frame to frame, and the last one adds its own, so that with
# more of them samples were sharper, but held together less. So most of the noise is drawn anew at every step, in which
# errors drown, and a sample is the mean of the last predictions of it.
STEPS, FRESH, AVERAGED = 8, 0.7, 3 / 8


@dataclass(frozen=True)
class Run:
    """Where a training run stands.

    Args:
        checkpoint: what it left.
        step: steps that are in it.
        finished: all steps of the recipe are done.
        seconds: spent in this call.
        losses: by step, those of earlier calls included.
    """

    checkpoint: Path
    step: int
    finished: bool
    seconds: float
    losses: dict[int, float]


def train(
    recipe: Recipe,
    source: Source,
    out: str | os.PathLike[str],
    *,
    fresh: bool = False,
    save_every: int = 250,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
    mesh: DeviceMesh | None = None,
) -> Run:
    """Trains into a folder, and goes on from the checkpoint that is there.

    An interrupt (Ctrl-C, SIGTERM) ends the run after the step at hand, with a checkpoint of it; a second one at once.

    Args:
        out: gets ``checkpoint.safetensors`` and ``losses.jsonl``.
        fresh: begin anew, over what is there.
        save_every: steps from checkpoint to checkpoint.
        on_step: called with the number of steps done and the last one's loss; with 0 or the steps of a checkpoint, and
            NaN, before the first.
        mesh: processes that share every clip: see :class:`Trainer`. The first one writes. All end where one is
            interrupted.

    Raises:
        CheckpointError: if the checkpoint is of another recipe or source.
        FloatingPointError: if a loss is not finite; the last checkpoint stays.
        ExchangeError: if a process ends; the last checkpoint stays.
    """
    if save_every < 1:
        raise ValueError(f"train: save_every must be at least 1, got {save_every}")
    out, begin = Path(out), time.perf_counter()
    path, trainer = out / CHECKPOINT, Trainer(recipe, source, device, mesh)
    writes = mesh is None or mesh.get_local_rank() == 0
    if path.exists() and not fresh:
        trainer.restore(path)
    losses = {} if fresh else _read_losses(out / LOSSES)
    losses = {step: loss for step, loss in losses.items() if step < trainer.step_count}
    out.mkdir(parents=True, exist_ok=True)
    if on_step is not None:
        on_step(trainer.step_count, float("nan"))
    saved = trainer.step_count if path.exists() and not fresh else -1
    with (out / LOSSES if writes else Path(os.devnull)).open("w", buffering=1) as log, _interrupts() as interrupted:
        log.writelines(_line(step, loss) for step, loss in losses.items())
        while trainer.step_count < recipe.steps and not _anywhere(interrupted.is_set(), mesh):
            step = trainer.step_count
            losses[step] = trainer.step()
            log.write(_line(step, losses[step]))
            if on_step is not None:
                on_step(step + 1, losses[step])
            if trainer.step_count % save_every == 0 and writes:
                trainer.save(path)
                saved = trainer.step_count
        if saved != trainer.step_count and writes:
            trainer.save(path)
    finished = trainer.step_count >= recipe.steps
    return Run(path, trainer.step_count, finished, time.perf_counter() - begin, losses)


def _anywhere(here: bool, mesh: DeviceMesh | None) -> bool:
    """Whether it is so on any rank: they must take the same steps."""
    return here if mesh is None else bool(total(torch.tensor(float(here), device=mesh.device_type), mesh))


@torch.no_grad()
def draw_videos(
    trained: Trained,
    count: int,
    *,
    frames: int | None = None,
    steps: int = STEPS,
    overlap: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_clip: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``(count, 3, frames, H, W)`` in [0, 1], from noise.

    Args:
        frames: None: as many as in training. More are spliced from clips, each with the last ``overlap`` frames of
            the one before it held clean; a causal model rolls on, chunk after chunk.
        steps: of the scheduler, for every clip.
        on_clip: called with the number of frames that are there, and of all.

    Raises:
        ValueError: if more frames are wanted of a model that was trained without held frames.
    """
    recipe = trained.recipe
    frames = recipe.frames if frames is None else frames
    for name, value in (("count", count), ("frames", frames), ("steps", steps)):
        if value < 1:
            raise ValueError(f"draw_videos: {name} must be at least 1, got {value}")
    if recipe.causal:
        return _rolled(trained, count, frames, steps, seed, device, on_clip)
    if frames > recipe.frames and not (recipe.hold and overlap):
        raise ValueError(
            f"draw_videos: frames must be at most {recipe.frames} where the model was trained without held frames "
            f"or there is no overlap, got {frames}"
        )
    patch = recipe.model.patch[0]
    if frames > recipe.frames and overlap % patch:
        raise ValueError(f"draw_videos: overlap must be a multiple of the {patch} frames of a token, got {overlap}")
    sampler = make_sampler(
        trained.model,
        process_for(recipe.target, recipe.sampling_shift),
        (count, recipe.model.in_channels, *recipe.size),
        steps,
        device=device,
        **how_to_sample(steps, torch.Generator().manual_seed(seed), spliced=frames > recipe.frames),
    )
    parts: list[Tensor] = []
    for part in splice(sampler, frames, recipe.frames, overlap if frames > recipe.frames else 0):
        parts.append(_pixels(part))
        if on_clip is not None:
            on_clip(sum(p.shape[2] for p in parts), frames)
    return torch.cat(parts, 2)


def how_to_sample(steps: int, generator: torch.Generator, *, spliced: bool = False) -> dict[str, Any]:
    """What :func:`sample`, :func:`roll` and :func:`make_sampler` are given to draw from a trained model.

    Args:
        spliced: no mean of predictions, which is smoother than the frames that it goes on from: seams would show.
    """
    return {"generator": generator, "average": 1 if spliced else max(int(steps * AVERAGED), 1), "fresh": FRESH}


def _pixels(video: Tensor) -> Tensor:
    """From the model's [-1, 1] to [0, 1], on the CPU."""
    return ((video.cpu() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def continue_clips(
    trained: Trained, clips: Tensor, *, steps: int = STEPS, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, int] | None:
    """The first half of clips ``(B, 3, T, H, W)`` in [0, 1], by whole tokens, gone on with by the model, and how many
    frames that half has; None of a model that was trained without held frames, or on clips of one token."""
    recipe = trained.recipe
    pt = recipe.model.patch[0]
    known = recipe.frames // pt // 2 * pt
    if not recipe.hold or known == 0:
        return None
    given, held = clips.to(device) * 2 - 1, torch.arange(recipe.frames, device=device) < known
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(given.shape, generator=random).to(device)
    process, how = process_for(recipe.target, recipe.sampling_shift), how_to_sample(steps, random)
    video = sample(trained.model, process, noise, steps, held=held, known=given, **how)
    return _pixels(video), known


def _rolled(
    trained: Trained,
    count: int,
    frames: int,
    steps: int,
    seed: int,
    device: torch.device | str,
    on_clip: Callable[[int, int], None] | None,
) -> Tensor:
    """Chunk after chunk, as :func:`vdcore.diffusion.roll` gives them."""
    recipe, mask, pt = trained.recipe, trained.recipe.model.frame_mask, trained.recipe.model.patch[0]
    chunks, random = -(-frames // (mask.chunk * pt)), torch.Generator().manual_seed(seed)
    shape = (count, recipe.model.in_channels, mask.chunk * pt, *recipe.size)
    noises = (torch.randn(shape, generator=random).to(device) for _ in range(chunks))
    cache = trained.model.new_cache(count, *recipe.size, frames=chunks * mask.chunk)
    parts: list[Tensor] = []
    process, how = process_for(recipe.target, recipe.sampling_shift), how_to_sample(steps, random)
    for part in roll(trained.model, process, noises, steps, cache, **how):
        parts.append(_pixels(part))
        if on_clip is not None:
            on_clip(min(sum(p.shape[2] for p in parts), frames), frames)
    return torch.cat(parts, 2)[:, :, :frames]


def real_clips(trained: Trained, count: int) -> Tensor | None:
    """Clips ``(count, 3, T, H, W)`` in [0, 1] of what the model was trained on, drawn apart from training's.

    Of scenes, ones that were never seen; of files, windows of the same files. None where the files are gone.
    """
    try:
        source = source_of(trained.source)
    except FileNotFoundError:
        return None
    return source.batch(count, torch.Generator().manual_seed(trained.recipe.seed + 2**32))


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that is set by the first interrupt; the second one acts as it did outside."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss}) + "\n"


def _read_losses(path: Path) -> dict[int, float]:
    """Losses by step; a last line that a crash cut off is left out."""
    losses: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        losses[row["step"]] = row["loss"]
    return losses


def plot_losses(losses: dict[int, float], path: Path) -> None:
    """A PNG of the losses by step and of their running mean; nothing for fewer than two."""
    if len(losses) < 2:
        return
    figure = need("matplotlib.figure", "bench", "plot_losses").Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    steps, values = list(losses), list(losses.values())
    axes.plot(steps, values, linewidth=0.5, alpha=0.4, label="loss")
    window = max(len(values) // 50, 1)
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    axes.plot(steps[window - 1 :], means, label=f"mean of {window}")
    axes.legend()
    figure.savefig(path, dpi=130)
