"""Inflation: an image model becomes a video model that begins, exactly, as the image model.

A model of single frames is trained, then temporal layers are put into it whose last weights are zero: at step 0 nothing
changes, to the bit. Then the image model and the inflated one are trained on, on the same clips, and part: the inflated
one sees what the other frames show.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.fit import fit, random_model
from experiments.show import GRAY, OFF, ON, new_plot, progress, save_plot
from vdcore.diffusion.training import SCENES, draw_timesteps, process_for
from vdcore.models import VDiT, VDiTConfig
from vdcore.models.inflate import inflate
from vdcore_bench.report.table import Table

NAME = "inflation"
FORMS = ("factorized", "alternating")
PROCESS, CLIPS = process_for("sample", shift=3.0), replace(SCENES, occluders=0)


@dataclass(frozen=True)
class Settings:
    """Sizes: the image model's, and steps of training before and after inflation."""

    width: int = 64
    depth: int = 3
    image_steps: int = 150
    video_steps: int = 100
    batch: int = 4
    lr: float = 3e-3


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Trains an image model on frames, inflates it, compares both on every clip, and goes on training both."""
    started = time.monotonic()
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=3,
        patch=(1, 4, 4),
        width=settings.width,
        depth=settings.depth,
        heads=4,
        attention="spatial",
        position="sincos+rope",
        qk_norm=True,
    )
    image, before_steps, after_steps = VDiT(config), settings.image_steps, settings.video_steps
    rows: list[tuple[str, str, float, float, int]] = []
    with progress(NAME) as track:
        train = partial(_train, settings=settings)
        before = train(image, ticks=track("image model", before_steps), steps=before_steps, seed=0)
        for modulation in ("zero", "single"):
            model = image if modulation == "zero" else random_model(replace(config, modulation="single"))
            for form in FORMS:
                inflated = inflate(model, attention=form)
                rows.append((form, modulation, *_difference(model, inflated), _learning(inflated)))
        video = inflate(image)
        after = {
            name: train(model, ticks=track(f"{name} model, on", after_steps), steps=after_steps, seed=1)
            for name, model in (("image", image), ("video", video))
        }
        apart, _ = _difference(image, video)
    _, _, differences, sizes, learning = zip(*rows)
    tail = max(after_steps // 4, 1)
    last = {name: sum(losses[-tail:]) / tail for name, losses in after.items()}
    header = ("attention", "modulation", "largest difference", "largest value", "temporal weights that learn at once")
    return Figure(
        name=NAME,
        claim="An image model inflated by zero-initialized temporal layers gives the image model's output, bit for "
        "bit, and its temporal layers learn from the first step.",
        numbers={
            "largest_difference_at_step_0": max(differences),
            "fewest_temporal_tensors_with_a_gradient": min(learning),
            "loss_of_the_video_model": last["video"],
        },
        compared_with={
            "difference_allowed": 0.0,
            "largest_value": min(sizes),
            "largest_difference_after_training_both": apart,
            "loss_of_the_image_model_trained_on": last["image"],
        },
        passed=max(differences) == 0 and min(learning) > 0 and apart > 0,
        size=f"width {settings.width}, {settings.depth} blocks; {settings.image_steps} steps on frames of "
        f"{CLIPS.size[0]}x{CLIPS.size[1]} pixels, then {settings.video_steps} of clips of {CLIPS.frames}, "
        f"{settings.batch} clips per step; losses are means of the last {tail}; {time.monotonic() - started:.0f} s",
        files=[_plot(out, before, after)],
        table=Table.of(header, rows, note="An image model and the video model made of it, on the same clips."),
        captions={f"{NAME}.png": "Training loss: before inflation, and of both models after it."},
    ).save(out)


def _train(model: VDiT, ticks: Iterable[int], steps: int, seed: int, settings: Settings) -> list[float]:
    """Losses; the same seed gives the same clips, noise and timesteps."""

    def loss(step: int, random: torch.Generator) -> Tensor:
        clean = CLIPS.batch(settings.batch, random).video * 2 - 1
        noise = torch.randn(clean.shape, generator=random)
        return PROCESS.loss(model, clean, noise, draw_timesteps(PROCESS, (settings.batch,), random, shift=3.0))

    return fit(model, loss, ticks, steps=steps, lr=settings.lr, seed=seed)


def _clips() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy clips, their timesteps, and the clean ones."""
    random = torch.Generator().manual_seed(3)
    clean = CLIPS.batch(4, random).video * 2 - 1
    timestep = torch.tensor([100.0, 400.0, 700.0, 1000.0])
    return PROCESS.add_noise(clean, torch.randn(clean.shape, generator=random), timestep), timestep, clean


@torch.no_grad()
def _difference(image: VDiT, video: VDiT) -> tuple[float, float]:
    """Largest difference of the outputs, and their largest value."""
    noisy, timestep, _ = _clips()
    a, b = image(noisy, timestep), video(noisy, timestep)
    return (a - b).abs().max().item(), a.abs().max().item()


def _learning(video: VDiT) -> int:
    """Parameters of temporal layers, gates included, that the first step would change."""
    noisy, timestep, clean = _clips()
    video.zero_grad(set_to_none=True)
    (video(noisy, timestep) - clean).square().mean().backward()
    found = [p.grad for name, p in video.named_parameters() if "temporal" in name or "modulation" in name]
    return sum(gradient is not None and bool(gradient.any()) for gradient in found)


def _plot(out: Path, before: list[float], after: dict[str, list[float]]) -> str:
    figure, axes = new_plot(7, 3.6)
    axis, first = axes[0][0], len(before)
    window = max(len(after["image"]) // 10, 1)
    for losses, start, color, label in (
        (before, 0, GRAY, "image model"),
        (after["image"], first, OFF, "image model, trained on"),
        (after["video"], first, ON, "inflated, trained on"),
    ):
        means = [sum(losses[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axis.plot(range(start, start + len(losses)), means, color=color, label=label)
    axis.axvline(first, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step (dotted: inflation)", ylabel="loss", yscale="log")
    axis.legend(fontsize=8)
    return save_plot(figure, out / f"{NAME}.png")
