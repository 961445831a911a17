"""Flicker: the same recipe with temporal attention and without it, judged by the metrics.

Two video DiTs are trained on the same clips for as many steps: one whose blocks attend inside a frame and then across
frames, one that attends inside frames only and has a block more, so that both have about as many weights. Each frame
begins from noise of its own. Without temporal attention nothing tells a frame what the others show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import GREY, OFF, ON, THIRD, Track, new_plot, progress, save_plot, save_table
from vdcore.diffusion import runs, training
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.measure import measures
from vdcore.diffusion.training import SMALL, Recipe, Trained, Trainer
from vdcore.metrics import temporal_fid
from vdcore.video import contact_sheet, real_windows, write_video

NAME = "flicker"
SCENES = replace(training.SCENES, size=(18, 18), radius=(3.0, 5.0))
ATTENTION = {"off": ("spatial", 4), "on": ("factorized", 3)}  # temporal attention -> VDiT's attention and depth
MEASURES = ("flicker", "warping_error", "residual", "acceleration", "mean_flow", "temporal_fid")
HALF = 0.5  # what "on" may have of the gap between "off" and real clips


@dataclass(frozen=True)
class Budget:
    """How long each model is trained, and how many clips are drawn of it."""

    steps: int = 320
    batch: int = 8
    width: int = 96
    clips: int = 32
    sampling_steps: int = 16


def recipe(kind: str, budget: Budget) -> Recipe:
    """Of temporal attention ``"on"`` or ``"off"``; all else is equal but one block."""
    attention, depth = ATTENTION[kind]
    # Tokens of one frame: what frames have to do with one another is then attention's alone.
    model = replace(SMALL, patch=(1, *SMALL.patch[1:]), attention=attention, depth=depth, width=budget.width, heads=4)
    return Recipe(model=model, frames=SCENES.frames, size=SCENES.size, batch=budget.batch, steps=budget.steps, hold=0.0)


def train(kind: str, budget: Budget, track: Track) -> Trained:
    """The averaged model."""
    trainer = Trainer(recipe(kind, budget), Scenes(SCENES))
    for _ in track(f"temporal attention {kind}", budget.steps):
        trainer.step()
    trainer.model.load_state_dict(trainer.average, strict=False)
    return Trained(trainer.model.eval(), trainer.recipe, trainer.step_count)


def run(out: Path, budget: Budget = Budget()) -> Figure:
    """Trains both, draws clips from the same noise, measures them, and writes pictures, a table and the figure."""
    started = time.monotonic()
    sets: dict[str, Tensor] = {}
    weights = {}
    with progress(NAME) as track:
        for kind in ATTENTION:
            trained = train(kind, budget, track)
            weights[kind] = sum(p.numel() for p in trained.model.parameters())
            sets[kind] = runs.draw_videos(trained, budget.clips, steps=budget.sampling_steps)
    unseen = SCENES.batch(range(2**40, 2**40 + 2 * budget.clips)).video
    sets["still"] = sets["on"][:, :, :1].expand_as(sets["on"])
    sets["real"] = unseen[: budget.clips]
    found = {name: _measure(video, unseen[budget.clips :]) for name, video in sets.items()}
    try:
        film = real_windows(SCENES.frames, SCENES.size, min(budget.clips, 24))
    except FileNotFoundError:
        film = None
    if film is not None:  # other pictures altogether: no distance to them would mean anything
        found["film"] = measures(film)
    files = [_plot(out, found), _table(out, found), *_videos(out, sets, film)]
    return _figure(out, found, weights, budget, files, time.monotonic() - started)


def _measure(video: Tensor, real: Tensor) -> dict[str, float]:
    return {**measures(video), "temporal_fid": temporal_fid(real, video).item()}


def _figure(
    out: Path,
    found: dict[str, dict[str, float]],
    weights: dict[str, int],
    budget: Budget,
    files: list[str],
    seconds: float,
) -> Figure:
    off, on, real = found["off"], found["on"], found["real"]
    left = {
        name: abs(on[name] - real[name]) / abs(off[name] - real[name])
        for name in ("flicker", "warping_error", "temporal_fid")
    }
    flickers = off["flicker"] < real["flicker"] and off["warping_error"] > real["warping_error"]
    figure = Figure(
        name=NAME,
        claim="Without temporal attention frames flicker; with it, at most half of the gap to real clips is left in "
        "the flicker score, the warping error and the temporal FID.",
        numbers={
            "on": on,
            "off": off,
            "gap_of_on_over_gap_of_off": left,
            "motion_of_on_over_real": on["mean_flow"] / real["mean_flow"],
        },
        compared_with={
            "real": real,
            "still": found["still"],
            **({"film": found["film"]} if "film" in found else {}),
            "most_of_the_gap": HALF,
        },
        passed=flickers and all(value <= HALF for value in left.values()),
        size=f"small models for minutes: {weights['on'] / 1e6:.2f} M weights with temporal attention and "
        f"{weights['off'] / 1e6:.2f} M without, {SCENES.frames} frames of {SCENES.size[0]}x{SCENES.size[1]} pixels of "
        f"synthetic scenes, {budget.steps} steps of {budget.batch} clips each; {budget.clips} clips of each set; "
        f"{seconds:.0f} s in all",
        files=files,
    )
    figure.save(out)
    return figure


LABELS = {
    "off": "temporal attention off",
    "on": "temporal attention on",
    "still": "one frame repeated",
    "real": "scenes, unseen",
    "film": "real films",
}


def _plot(out: Path, found: dict[str, dict[str, float]]) -> str:
    names = ("flicker", "warping_error", "mean_flow", "temporal_fid")
    titles = ("1 - flicker score", "warping error", "mean flow, pixels a frame", "temporal FID (uncalibrated)")
    figure, axes = new_plot(11, 3, columns=len(names))
    colours = {"off": OFF, "on": ON, "still": "#c9c9c9", "real": THIRD, "film": GREY}
    for axis, name, title in zip(axes[0], names, titles):
        shown = [kind for kind in found if name in found[kind]]
        values = [1 - found[kind][name] if name == "flicker" else found[kind][name] for kind in shown]
        axis.bar(range(len(shown)), values, color=[colours[kind] for kind in shown])
        axis.set_xticks(range(len(shown)), shown, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.2)
        axis.set_axisbelow(True)
    return save_plot(figure, out / f"{NAME}.png")


def _table(out: Path, found: dict[str, dict[str, float]]) -> str:
    text = (
        "Means over clips. flicker: VBench's score, higher is steadier; warping error: mean square of values in "
        "[0, 1]; residual and acceleration of the flow, and mean flow: pixels. A still video wins all but the last "
        "two. Temporal FID is against other unseen scenes, and is not calibrated."
    )
    rows: list[list[Any]] = []
    for kind, values in found.items():
        cells = [f"{values[name]:.4g}" if name in values else "-" for name in MEASURES]
        rows.append([LABELS[kind], *cells])
    return save_table(out / f"{NAME}.md", ["", *MEASURES], rows, text)


def _videos(out: Path, sets: dict[str, Tensor], film: Tensor | None) -> list[str]:
    shown = [(kind, clip) for kind in ("off", "on", "real") for clip in sets[kind][:3]]
    kinds, clips = [kind for kind, _ in shown], [clip for _, clip in shown]
    if film is not None:
        clips, kinds = [*clips, *film[:: max(len(film) // 3, 1)][:3]], [*kinds, "film", "film", "film"]
    sheet = contact_sheet(out / f"{NAME}_clips.png", clips, labels=kinds, scale=3)
    rows = torch.cat([torch.cat(list(sets[kind][:6]), -1) for kind in ("off", "on", "real")], -2)
    return [sheet.name, write_video(out / f"{NAME}.gif", rows, 8, scale=3).name]
