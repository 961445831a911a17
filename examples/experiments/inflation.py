"""Inflation: an image model becomes a video model that begins, exactly, as the image model."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import GREY, OFF, ON, new_plot, progress, save_plot, save_table
from vdcore.diffusion.process import Process
from vdcore.diffusion.training import SCENES, draw_timesteps, process_for
from vdcore.models import VDiT, VDiTConfig
from vdcore.models.inflate import inflate
from vdcore.video import MovingShapes

NAME = "inflation"
FORMS = ("factorized", "alternating")


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
    process, scenes = process_for("sample", shift=3.0), replace(SCENES, occluders=0)
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=3, patch=(1, 4, 4), width=settings.width, depth=settings.depth, heads=4,
        attention="spatial", position="sincos+rope", qk_norm=True,
    )  # fmt: skip
    rows: list[tuple[str, str, float, float, int]] = []
    with progress(NAME) as track:
        image = VDiT(config)
        before = _train(image, process, scenes, settings, track("image model", settings.image_steps), seed=0)
        for modulation in ("zero", "single"):
            model = image if modulation == "zero" else _opened(replace(config, modulation="single"))
            for form in FORMS:
                inflated = inflate(model, attention=form)
                difference, size = _difference(model, inflated, process, scenes)
                rows.append((form, modulation, difference, size, _learning(inflated, process, scenes)))
        video = inflate(image)
        image_losses = _train(image, process, scenes, settings, track("image model, on", settings.video_steps), seed=1)
        video_losses = _train(video, process, scenes, settings, track("video model", settings.video_steps), seed=1)
        apart, _ = _difference(image, video, process, scenes)
    exact = max(row[2] for row in rows)
    tail = max(settings.video_steps // 4, 1)
    last = {name: sum(x[-tail:]) / tail for name, x in (("video", video_losses), ("image", image_losses))}
    header = ("attention", "modulation", "largest difference", "largest value", "temporal weights that learn at once")
    files = [
        _plot(out, before, image_losses, video_losses),
        save_table(
            out / f"{NAME}.md", header, rows, "An image model and the video model made of it, on the same clips."
        ),
    ]
    figure = Figure(
        name=NAME,
        claim="An image model inflated by zero-initialised temporal layers gives the image model's output, bit for "
        "bit, and its temporal layers learn from the first step.",
        numbers={
            "largest_difference_at_step_0": exact,
            "fewest_temporal_tensors_with_a_gradient": min(row[4] for row in rows),
            "loss_of_the_video_model": last["video"],
        },
        compared_with={
            "difference_allowed": 0.0,
            "largest_value": min(row[3] for row in rows),
            "largest_difference_after_training_both": apart,
            "loss_of_the_image_model_trained_on": last["image"],
        },
        passed=exact == 0 and min(row[4] for row in rows) > 0 and apart > 0,
        size=f"width {settings.width}, {settings.depth} blocks; {settings.image_steps} steps on frames of "
        f"{scenes.size[0]}x{scenes.size[1]} pixels, then {settings.video_steps} of clips of {scenes.frames}, "
        f"{settings.batch} clips a step; losses are means of the last {tail}; {time.monotonic() - started:.0f} s",
        files=files,
    )
    figure.save(out)
    return figure


def _train(
    model: VDiT, process: Process, scenes: MovingShapes, settings: Settings, ticks: object, seed: int
) -> list[float]:
    """Losses; the same seed gives the same clips, noise and timesteps."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for _ in ticks:  # type: ignore[attr-defined]
        clean = scenes.batch(settings.batch, random).video * 2 - 1
        noise = torch.randn(clean.shape, generator=random)
        loss = process.loss(model, clean, noise, draw_timesteps(process, (settings.batch,), random, shift=3.0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _opened(config: VDiTConfig) -> VDiT:
    """Random weights in every layer, those included that begin at 0."""
    torch.manual_seed(0)
    model = VDiT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def _clips(process: Process, scenes: MovingShapes) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    clean = scenes.batch(4, random).video * 2 - 1
    timestep = torch.tensor([100.0, 400.0, 700.0, 1000.0])
    return process.add_noise(clean, torch.randn(clean.shape, generator=random), timestep), timestep, clean


@torch.no_grad()
def _difference(image: VDiT, video: VDiT, process: Process, scenes: MovingShapes) -> tuple[float, float]:
    """Largest difference of the outputs, and their largest value."""
    noisy, timestep, _ = _clips(process, scenes)
    a, b = image(noisy, timestep), video(noisy, timestep)
    return (a - b).abs().max().item(), a.abs().max().item()


def _learning(video: VDiT, process: Process, scenes: MovingShapes) -> int:
    """Parameters of temporal layers, gates included, that the first step would change."""
    noisy, timestep, clean = _clips(process, scenes)
    video.zero_grad(set_to_none=True)
    (video(noisy, timestep) - clean).square().mean().backward()
    named = [(name, p) for name, p in video.named_parameters() if "temporal" in name or "modulation" in name]
    found = sum(p.grad is not None and bool(p.grad.any()) for _, p in named)
    video.zero_grad(set_to_none=True)
    return found


def _plot(out: Path, before: list[float], image: list[float], video: list[float]) -> str:
    figure, axes = new_plot(7, 3.6)
    axis, first = axes[0][0], len(before)
    window = max(len(image) // 10, 1)

    def draw(losses: list[float], start: int, colour: str, label: str) -> None:
        means = [sum(losses[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axis.plot(range(start, start + len(losses)), means, color=colour, label=label)

    draw(before, 0, GREY, "image model")
    draw(image, first, OFF, "image model, trained on")
    draw(video, first, ON, "inflated, trained on")
    axis.axvline(first, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step (dotted: inflation)", ylabel="loss", yscale="log")
    axis.legend(fontsize=8)
    return save_plot(figure, out / f"{NAME}.png")
