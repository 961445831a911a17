"""``vdcore train`` and ``vdcore sample``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from vdcore.diffusion.training import Recipe

OUT = Path("out/train")
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")]
THREADS = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")]


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal; where there is none they are disabled, and whoever has them prints a line now and then."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


class Meter:
    """Shows how training goes on."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self.bar, self.steps = bar, steps
        self.task = bar.add_task("training", total=steps)
        self.mean, self.begin, self.first, self.said = math.nan, time.monotonic(), 0, 0.0

    def __call__(self, step: int, loss: float) -> None:
        if math.isnan(loss):
            self.first = step
        else:
            self.mean = loss if math.isnan(self.mean) else 0.98 * self.mean + 0.02 * loss
        self.bar.update(self.task, completed=step, description=f"training, loss {self.mean:.4f}")
        now = time.monotonic()
        if not self.bar.disable or now - self.said < 20 or step == self.first:
            return
        self.said = now
        left = (now - self.begin) / (step - self.first) * (self.steps - step)
        print(f"step {step} of {self.steps}, loss {self.mean:.4f}, {left:.0f} s to go", file=sys.stderr, flush=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can do something about is a line, and exit code 1; every other exception is a bug, and shown."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vdcore: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def train(
    clips: Annotated[
        list[Path] | None, typer.Argument(help="Video files, or folders of them; none: synthetic scenes.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the losses.")] = OUT,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips in a step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="AdamW's learning rate.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Frames of a clip.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of a clip, pixels.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Of files, every stride-th frame.")] = 1,
    patch: Annotated[int | None, typer.Option(min=1, help="Height and width of a token, pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of a token.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads; they divide the width.")] = None,
    attention: Annotated[str | None, typer.Option(help="factorized, gated or full.")] = None,
    target: Annotated[str | None, typer.Option(help="sample, flow, v_prediction or epsilon.")] = None,
    hold: Annotated[float | None, typer.Option(min=0, max=1, help="Share of clips with frames held clean.")] = None,
    forcing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of clips with a timestep of its own for every frame.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of all that is drawn.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = 250,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, over the checkpoint in --out.")] = False,
    threads: THREADS = None,
    device: DEVICE = "cpu",
) -> None:
    """Trains a small video diffusion transformer, by default on synthetic scenes: minutes on two cores.

    Goes on from the checkpoint in --out as if it had never stopped; Ctrl-C loses nothing.
    """
    from vdcore.diffusion import runs
    from vdcore.diffusion.data import Clips, Scenes, Source
    from vdcore.diffusion.training import SCENES, Recipe

    _set_threads(threads)
    with plain_errors():
        model = _given(
            Recipe().model,
            patch=None if patch is None else (Recipe().model.patch[0], patch, patch),
            width=width,
            depth=depth,
            heads=heads,
        )
        recipe: Recipe = _given(
            Recipe(),
            model=_given(model, attention=attention),
            target=target,
            frames=frames,
            size=None if size is None else (size, size),
            batch=batch,
            steps=steps,
            lr=lr,
            hold=hold,
            forcing=forcing,
            seed=seed,
        )
        source: Source
        if clips:
            source = Clips(clips, recipe.frames, recipe.size, stride)
        else:
            source = Scenes(replace(SCENES, frames=recipe.frames, size=recipe.size))
        with progress() as bar:
            run = runs.train(
                recipe, source, out, fresh=fresh, save_every=save_every, device=device, on_step=Meter(bar, recipe.steps)
            )
        plot_losses(run.losses, out / "losses.png")
    last = list(run.losses.values())[-100:]
    print(f"{run.checkpoint}: step {run.step} of {recipe.steps}, loss {sum(last) / max(len(last), 1):.4f}")
    if not run.finished:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130)
    print(f"next: vdcore sample {run.checkpoint}")


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="What vdcore train left.")] = OUT / "checkpoint.safetensors",
    out: Annotated[Path, typer.Option(help="Folder for videos, contact sheet and measures.")] = Path("out/sample"),
    count: Annotated[int, typer.Option(min=1, help="Videos.")] = 32,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Of a video; more than in training are spliced from clips.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Frames that a spliced clip takes over from the last.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the scheduler; default: 4.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames a second of the files.")] = 8.0,
    kind: Annotated[str, typer.Option("--format", help="mp4 or gif.")] = "mp4",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    threads: THREADS = None,
    device: DEVICE = "cpu",
) -> None:
    """Samples videos, and measures them against clips that the model was not shown.

    Leaves sample-00.mp4 and so on, samples.png with real clips in its upper rows, and measures.json.
    """
    from vdcore.diffusion import runs
    from vdcore.diffusion.measure import REAL_CLIPS
    from vdcore.diffusion.training import load_trained
    from vdcore.video.files import contact_sheet, write_video

    if kind not in ("mp4", "gif"):
        raise typer.BadParameter(f"{kind}: not known; known are mp4, gif", param_hint="--format")
    _set_threads(threads)
    with plain_errors():
        trained = load_trained(checkpoint, device)
        with progress() as bar:
            task = bar.add_task("sampling", total=frames or trained.recipe.frames)
            videos = runs.draw_videos(
                trained,
                count,
                frames=frames,
                steps=runs.STEPS if steps is None else steps,
                overlap=overlap,
                seed=seed,
                device=device,
                on_clip=lambda done, of: bar.update(task, completed=done, total=of),
            )
        for i, video in enumerate(videos):
            write_video(out / f"sample-{i:02d}.{kind}", video, fps, scale=8)
        real = runs.real_clips(trained, max(count, REAL_CLIPS))
        shown, rows = min(count, 8), [] if real is None else list(real[:4])
        labels = ["real"] * len(rows) + ["sample"] * shown
        contact_sheet(
            out / "samples.png", [*rows, *(v[:, : trained.recipe.frames] for v in videos[:shown])], labels=labels
        )
        print(f"{count} videos of {videos.shape[2]} frames and samples.png in {out}")
        if real is None:
            print("not measured: the clips of training are not here", file=sys.stderr)
        else:
            _measure(videos, real, out / "measures.json", trained.step)


def _measure(videos: Any, real: Any, path: Path, step: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from vdcore.diffusion.measure import against

    if videos.shape[2] < 2 or real.shape[2] < 2:
        return
    found = against(real)(videos)
    table = Table("measure", "samples", "real clips", box=None)
    for name, value in found.samples.items():
        table.add_row(name, f"{value:.4g}", f"{found.real[name]:.4g}")
    table.add_row("temporal_fid", f"{found.temporal_fid:.4g}", f"{found.temporal_fid_of_real:.4g} (half against half)")
    Console(highlight=False).print(table)
    verdict = "yes" if found.moves_as_real else "no"
    print(
        f"moves as real clips do (warping error at most twice theirs, mean flow between half and twice): {verdict}; "
        f"warping error {found.error_ratio:.2f} x, mean flow {found.motion_ratio:.2f} x"
    )
    values = {
        "step": step,
        "samples": found.samples,
        "real": found.real,
        "temporal_fid": found.temporal_fid,
        "temporal_fid_of_real": found.temporal_fid_of_real,
        "error_ratio": found.error_ratio,
        "motion_ratio": found.motion_ratio,
        "moves_as_real": found.moves_as_real,
    }
    path.write_text(json.dumps(values, indent=1) + "\n")


def _given(value: Any, **changes: Any) -> Any:
    """A dataclass with those changes that are not None."""
    return replace(value, **{name: change for name, change in changes.items() if change is not None})


def _set_threads(number: int | None) -> None:
    import torch

    if number is not None:
        torch.set_num_threads(number)


def plot_losses(losses: dict[int, float], path: Path) -> None:
    if len(losses) < 2:
        return
    from vdcore.extras import need

    need("matplotlib", "bench", "vdcore train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    steps, values = list(losses), list(losses.values())
    axes.plot(steps, values, linewidth=0.5, alpha=0.4, label="loss")
    window = max(len(values) // 50, 1)
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    axes.plot(steps[window - 1 :], means, label=f"mean of {window}")
    axes.legend()
    figure.savefig(path, dpi=130)
