"""Flicker: the same recipe with temporal attention and without it, judged by the metrics.

Two video DiTs are trained on the same clips for as many steps: one whose blocks attend inside a frame and then across
frames, one that attends inside frames only and has a block more, so that both have about as many weights. Each frame
begins from noise of its own. Without temporal attention nothing tells a frame what the others show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import GRAY, OFF, ON, THIRD, Track, new_plot, progress, save_plot
from vdcore.diffusion import runs, training
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.measure import measures
from vdcore.diffusion.training import SMALL, Recipe, Trained, Trainer
from vdcore.metrics import temporal_fid
from vdcore.video import contact_sheet, real_windows, write_video
from vdcore_bench.report.table import Table

NAME = "flicker"
SCENES = replace(training.SCENES, size=(18, 18), radius=(3.0, 5.0))
ATTENTION = {"off": ("spatial", 4), "on": ("factorized", 3)}  # temporal attention -> VDiT's attention and depth
MEASURES = ("flicker", "warping_error", "residual", "acceleration", "mean_flow", "temporal_fid")
HALF = 0.5  # most of the gap between "off" and real clips that may be left with "on"
SETS = {  # of clips -> its label and color
    "off": ("temporal attention off", OFF),
    "on": ("temporal attention on", ON),
    "still": ("one frame repeated", "#c9c9c9"),
    "real": ("scenes, unseen", THIRD),
    "film": ("real films", GRAY),
}


@dataclass(frozen=True)
class TrainConfig:
    """How long each model is trained, and the number of clips that are drawn of it."""

    steps: int = 320
    batch: int = 8
    width: int = 96
    clips: int = 32
    sampling_steps: int = 16


def recipe(kind: str, config: TrainConfig) -> Recipe:
    """Of temporal attention ``"on"`` or ``"off"``; all else is equal but one block."""
    attention, depth = ATTENTION[kind]
    # Tokens of one frame: what frames have to do with one another is then attention's alone.
    model = replace(SMALL, patch=(1, *SMALL.patch[1:]), attention=attention, depth=depth, width=config.width, heads=4)
    return Recipe(model=model, frames=SCENES.frames, size=SCENES.size, batch=config.batch, steps=config.steps, hold=0.0)


def train(kind: str, config: TrainConfig, track: Track) -> Trained:
    """The averaged model."""
    trainer = Trainer(recipe(kind, config), Scenes(SCENES))
    for _ in track(f"temporal attention {kind}", config.steps):
        trainer.step()
    trainer.model.load_state_dict(trainer.average, strict=False)
    return Trained(trainer.model.eval(), trainer.recipe, trainer.step_count)


def run(out: Path, config: TrainConfig = TrainConfig()) -> Figure:
    """Trains both, draws clips from the same noise, measures them, and writes pictures, a table and the figure."""
    started = time.monotonic()
    sets: dict[str, Tensor] = {}
    weights = {}
    with progress(NAME) as track:
        for kind in ATTENTION:
            trained = train(kind, config, track)
            weights[kind] = sum(p.numel() for p in trained.model.parameters())
            sets[kind] = runs.draw_videos(trained, config.clips, steps=config.sampling_steps)
    unseen = SCENES.batch(range(2**40, 2**40 + 2 * config.clips)).video
    sets["still"] = sets["on"][:, :, :1].expand_as(sets["on"])
    sets["real"], others = unseen[: config.clips], unseen[config.clips :]
    found = {
        name: {**measures(video), "temporal_fid": temporal_fid(others, video).item()} for name, video in sets.items()
    }
    try:
        sets["film"] = real_windows(SCENES.frames, SCENES.size, min(config.clips, 24))
        found["film"] = measures(sets["film"])  # other pictures altogether: no distance to them would mean anything
    except FileNotFoundError:
        pass
    off, on, real = found["off"], found["on"], found["real"]
    left = {
        name: abs(on[name] - real[name]) / abs(off[name] - real[name])
        for name in ("flicker", "warping_error", "temporal_fid")
    }
    flickers = off["flicker"] < real["flicker"] and off["warping_error"] > real["warping_error"]
    return Figure(
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
            **{name: found[name] for name in ("real", "still", "film") if name in found},
            "most_of_the_gap": HALF,
        },
        passed=flickers and all(value <= HALF for value in left.values()),
        size=f"small models for minutes: {weights['on'] / 1e6:.2f} M weights with temporal attention and "
        f"{weights['off'] / 1e6:.2f} M without, {SCENES.frames} frames of {SCENES.size[0]}x{SCENES.size[1]} pixels of "
        f"synthetic scenes, {config.steps} steps of {config.batch} clips each; {config.clips} clips of each set; "
        f"{time.monotonic() - started:.0f} s in all",
        files=[_plot(out, found), *_videos(out, sets)],
        table=_table(found),
        captions={
            f"{NAME}.png": "Means of every set of clips: temporal attention off and on, one frame repeated (still), "
            "scenes that training did not show (real), and real films where they are at hand. On should lie near real.",
            f"{NAME}_clips.png": "A clip in each row, its frames from left to right.",
            f"{NAME}.gif": "Rows: temporal attention off, on, real scenes. The first row flickers.",
        },
    ).save(out)


def _plot(out: Path, found: dict[str, dict[str, float]]) -> str:
    names = ("flicker", "warping_error", "mean_flow", "temporal_fid")
    titles = ("1 - flicker score", "warping error", "mean flow, pixels per frame", "temporal FID (uncalibrated)")
    figure, axes = new_plot(11, 3, columns=len(names))
    for axis, name, title in zip(axes[0], names, titles):
        kinds = [kind for kind in found if name in found[kind]]
        values = [1 - found[kind][name] if name == "flicker" else found[kind][name] for kind in kinds]
        axis.bar(range(len(kinds)), values, color=[SETS[kind][1] for kind in kinds])
        axis.set_xticks(range(len(kinds)), kinds, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.2)
        axis.set_axisbelow(True)
    return save_plot(figure, out / f"{NAME}.png")


def _table(found: dict[str, dict[str, float]]) -> Table:
    text = (
        "Means over clips. flicker: VBench's score, higher is steadier; warping error: mean square of values in "
        "[0, 1]; residual and acceleration of the flow, and mean flow: pixels. A still video wins all but the last "
        "two. Temporal FID is against other unseen scenes, and is not calibrated."
    )
    rows = [
        [SETS[kind][0], *(f"{values[name]:.4g}" if name in values else "-" for name in MEASURES)]
        for kind, values in found.items()
    ]
    return Table.of(("", *MEASURES), rows, note=text)


def _videos(out: Path, sets: dict[str, Tensor]) -> list[str]:
    shown = {kind: video[:: max(len(video) // 3, 1)] if kind == "film" else video for kind, video in sets.items()}
    rows = [(kind, clip) for kind in ("off", "on", "real", "film") for clip in shown.get(kind, ())[:3]]
    labels, clips = zip(*rows)
    sheet = contact_sheet(out / f"{NAME}_clips.png", clips, labels=labels, scale=3)
    together = torch.cat([torch.cat(list(sets[kind][:6]), -1) for kind in ("off", "on", "real")], -2)
    return [sheet.name, write_video(out / f"{NAME}.gif", together, 8, scale=3).name]
