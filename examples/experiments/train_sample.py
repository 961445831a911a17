"""Train a video DiT on moving, occluded shapes, sample from it, and measure whether its videos move as real ones do.

A small video DiT learns, from noise, clips of an object that moves over a background and behind a bar. Then it draws
clips of its own. The warping error brings each frame back along the motion that is seen and subtracts the one before:
what is left is flicker and change of shape. Ratios are those of the samples' mean to the mean of clips that training
did not show: 1 is as real, and a still video would have a warping error of 0, which is why motion counts too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.figure import Figure
from experiments.show import progress
from vdcore.diffusion import runs
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.measure import LEAST_MOTION, MOST_ERROR, MOST_MOTION, REAL_CLIPS, against
from vdcore.diffusion.training import SCENES, Recipe, load_trained
from vdcore.video import contact_sheet, write_video
from vdcore_bench.report.table import Table

NAME = "train_sample"
NOTE = (
    "Means over the samples and over clips that training did not show; warping error in squared gray levels of [0, 1], "
    "flow in pixels per frame; flicker: VBench's score, 1 is a still video; residual and acceleration of the flow, in "
    "pixels: how far it leads astray there and back, and how much it changes. Temporal FID (not calibrated): samples "
    "against real clips, and one half of the real clips against the other."
)

CAPTIONS = {
    f"{NAME}.png": "A clip in each row, its frames from left to right: four that training did not show, below them "
    "samples, as they come.",
    f"{NAME}.gif": "Samples, moving.",
    f"{NAME}_losses.png": "The training loss by step.",
}


def checkpoint(out: Path) -> Path:
    """Of the model that is trained, below the demo's folder."""
    return out / "train" / runs.CHECKPOINT


def run(
    out: Path,
    recipe: Recipe | None = None,
    samples: int = 64,
    steps: int = runs.STEPS,
    other_steps: Sequence[int] = (runs.STEPS // 2, 2 * runs.STEPS),
) -> Figure:
    """Trains, or goes on training, in ``out/train``; writes videos, a contact sheet, losses and the figure.

    Args:
        samples: how many are drawn and measured.
        steps: of the scheduler.
        other_steps: measured beside it.
    """
    recipe = recipe or Recipe()
    source = Scenes(replace(SCENES, frames=recipe.frames, size=recipe.size))
    resumed = checkpoint(out).exists()
    with progress(NAME) as track:
        ticks = iter(track("training", recipe.steps))

        def on_step(step: int, loss: float) -> None:
            for _ in range(step if math.isnan(loss) else 1):
                next(ticks, None)

        trained_run = runs.train(recipe, source, checkpoint(out).parent, on_step=on_step)
        if not trained_run.finished:
            raise KeyboardInterrupt
        begin = time.perf_counter()
        trained = load_trained(trained_run.checkpoint)
        videos = runs.draw_videos(trained, samples, steps=steps)
        sampling = time.perf_counter() - begin
    real = runs.real_clips(trained, REAL_CLIPS)
    assert real is not None
    compare = against(real)
    found = compare(videos)
    by_steps = {n: compare(runs.draw_videos(trained, samples, steps=n)) for n in other_steps}
    rows = [(name, value, found.real[name]) for name, value in found.samples.items()]
    rows.append(("temporal_fid", found.temporal_fid, found.temporal_fid_of_real))
    shown, labels = [*real[:4], *videos[:8]], ["real"] * 4 + ["sample"] * min(8, len(videos))
    row = torch.cat(list(videos[:6]), -1)
    runs.plot_losses(trained_run.losses, out / f"{NAME}_losses.png")
    weights = sum(p.numel() for p in trained.model.parameters())
    return Figure(
        name=NAME,
        claim="A model trained in minutes on two cores has learned the motion: its samples have at most "
        f"{MOST_ERROR:g} times the warping error of clips that it was not shown, at {LEAST_MOTION:g} to "
        f"{MOST_MOTION:g} times their motion.",
        numbers={
            "error_ratio": found.error_ratio,
            "motion_ratio": found.motion_ratio,
            "samples": found.samples,
            "real": found.real,
            "temporal_fid": found.temporal_fid,
            "with_other_steps": {
                n: {"error_ratio": other.error_ratio, "motion_ratio": other.motion_ratio}
                for n, other in by_steps.items()
            },
            "train_seconds": None if resumed else trained_run.seconds,
            "sample_seconds": sampling,
            "threads": torch.get_num_threads(),
        },
        compared_with={
            "most_error_ratio": MOST_ERROR,
            "motion_ratio_from": LEAST_MOTION,
            "motion_ratio_to": MOST_MOTION,
            "temporal_fid_of_real_halves": found.temporal_fid_of_real,
        },
        passed=found.moves_as_real,
        size=f"{weights / 1e6:.1f} M weights, clips of {recipe.frames} frames of {recipe.size[0]}x{recipe.size[1]} "
        f"pixels, {recipe.steps} steps of {recipe.batch} clips; {samples} samples of {steps} steps",
        files=[
            contact_sheet(out / f"{NAME}.png", shown, labels=labels).name,
            write_video(out / f"{NAME}.gif", row, 8, scale=4).name,
            write_video(out / f"{NAME}.mp4", row, 8, scale=6).name,
            f"{NAME}_losses.png",
        ],
        table=Table.of(("measure", "samples", "real clips"), rows, note=NOTE),
        captions=CAPTIONS,
    ).save(out)
