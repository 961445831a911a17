"""``vdcore train``."""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdcore.cli.options import THREADS, set_threads
from vdcore.cli.ranks import PATIENCE, join, launched, relaunch
from vdcore.cli.shared import DEVICE, TRAIN_OUT, plain_errors

if TYPE_CHECKING:
    from rich.progress import Progress

    from vdcore.diffusion.data import Source
    from vdcore.diffusion.training import Recipe
    from vdcore.models import VDiTConfig

LEAST_STEPS = 500  # of training, below which there is nothing to choose the sampler's steps by


def train(
    clips: Annotated[
        list[Path] | None, typer.Argument(help="Video files, or folders of them; none: synthetic scenes.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the losses.")] = TRAIN_OUT,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips per step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="AdamW's learning rate.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Frames per clip.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of a clip, pixels.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Of files, every stride-th frame.")] = 1,
    fps: Annotated[
        float | None, typer.Option(help="Of files, so many frames per second, in place of --stride.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a bad or short file in a folder.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode files ahead; 0: none.")] = 1,
    mirror: Annotated[bool, typer.Option("--mirror", help="Of files, half of the windows mirrored.")] = False,
    patch: Annotated[int | None, typer.Option(min=1, help="Height and width of a token, pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels per token.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads; they divide the width.")] = None,
    attention: Annotated[str | None, typer.Option(help="factorized, gated or full.")] = None,
    position: Annotated[
        str | None, typer.Option(help="sincos, rope or sincos+rope; default: rope, of files sincos+rope.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Of attention, such as causal, radial or tiles:3/3/3:1/4/8: see vdcore masks.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="sample, flow, v_prediction or epsilon.")] = None,
    hold: Annotated[float | None, typer.Option(min=0, max=1, help="Share of clips with frames held clean.")] = None,
    forcing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of clips with a timestep of its own for every frame.")
    ] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Teacher forcing: each chunk sees clean chunks before it; samples roll on.")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, help="With --causal, token frames per chunk.")] = 1,
    past: Annotated[int | None, typer.Option(min=0, help="With --causal, chunks that a frame sees; all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of all that is drawn.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = 250,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, replacing the checkpoint in --out.")] = False,
    threads: THREADS = None,
    device: DEVICE = "cpu",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the frames of every clip (torchrun).")] = 1,
    patience: PATIENCE = 300,
) -> None:
    """Trains a small video diffusion transformer: on two cores minutes on synthetic scenes, on films half an hour.

    Continues from the checkpoint in --out as if it had never stopped, with any number of ranks; Ctrl-C loses nothing.
    """
    if ranks > 1 and not launched():
        raise typer.Exit(relaunch(ranks))
    from vdcore.diffusion import runs
    from vdcore.diffusion.training import FILMS, Recipe
    from vdcore_bench.report.terminal import progress

    set_threads(threads)
    with plain_errors():
        token: dict[str, Any] = {"patch": patch, "width": width, "depth": depth, "heads": heads}
        token |= {"attention": attention, "position": position}
        clip = {"frames": frames, "size": None if size is None else (size, size)}
        training = {"batch": batch, "steps": steps, "lr": lr, "hold": hold, "forcing": forcing, "seed": seed}
        default, changes = FILMS if clips else Recipe(), {"target": target, **clip, **training}
        recipe = _recipe(default, token, changes, mask=mask, causal=causal, chunk=chunk, past=past)
        source = _source(clips, recipe, stride=stride, fps=fps, strict=strict, workers=workers, mirror=mirror)
        mesh = join(ranks, device, patience) if ranks > 1 else None
        silent = mesh is not None and mesh.get_local_rank() > 0
        options: dict[str, Any] = {"fresh": fresh, "save_every": save_every, "device": device, "mesh": mesh}
        with nullcontext() if silent else progress() as bar:
            run = runs.train(recipe, source, out, on_step=None if bar is None else Meter(bar, recipe.steps), **options)
        if silent:
            raise typer.Exit(0 if run.finished else 130)
        runs.plot_losses(run.losses, out / "losses.png")
    last = list(run.losses.values())[-100:]
    print(f"{run.checkpoint}: step {run.step} of {recipe.steps}, loss {sum(last) / max(len(last), 1):.4f}")
    if not run.finished:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130)
    _measure_steps(run.checkpoint, device, recipe.steps)
    print(f"next: vdcore sample {run.checkpoint}")


def _measure_steps(checkpoint: Path, device: str, trained_for: int) -> None:
    """Keeps beside the checkpoint how many steps of the sampler suit it."""
    if trained_for < LEAST_STEPS:
        return
    from vdcore.diffusion import best_steps
    from vdcore.diffusion.training import load_trained
    from vdcore_bench.report.terminal import progress

    trained = load_trained(checkpoint, device)
    if best_steps.load(checkpoint, trained.step) is not None:
        return
    with progress() as bar:
        task = bar.add_task("measuring the sampler's steps", total=len(best_steps.TRIED))
        found = best_steps.measure_steps(trained, device, on_tried=lambda steps: bar.advance(task))
    if found is not None:
        best_steps.save(found, checkpoint.parent)
        print(f"best steps of the sampler: {found.draw} from noise, {found.go_on} to go on with a clip")


def _source(clips: list[Path] | None, recipe: Recipe, **reading: Any) -> Source:
    """Files, or without any synthetic scenes; ``reading``: of files."""
    from vdcore.diffusion.data import Clips, Scenes
    from vdcore.diffusion.training import SCENES

    if clips:
        return Clips(clips, recipe.frames, recipe.size, **reading)
    return Scenes(replace(SCENES, frames=recipe.frames, size=recipe.size))


def _recipe(
    default: Recipe,
    token: dict[str, Any],
    others: dict[str, Any],
    *,
    mask: str | None,
    causal: bool,
    chunk: int,
    past: int | None,
) -> Recipe:
    """The default's, with those options that were given; ``token``: of the model."""
    from vdcore import FrameMask

    patch = token["patch"]
    token = {**token, "patch": None if patch is None else (default.model.patch[0], patch, patch)}
    if mask is not None and causal:
        raise typer.BadParameter("it is --causal's already", param_hint="--mask")
    if mask is not None:
        frames, size = others["frames"] or default.frames, (others["size"] or default.size)[0]
        token["mask"] = _mask(mask, _given(default.model, **token), frames, size)
    if causal:
        token["mask"] = FrameMask(past=past, future=0, chunk=chunk)
        others = {**others, "hold": others["hold"] or 0.0}
    elif chunk != 1 or past is not None:
        raise typer.BadParameter("it needs --causal", param_hint="--chunk and --past")
    return _given(default, model=_given(default.model, **token), causal=causal, **others)


def _mask(name: str, model: VDiTConfig, frames: int, size: int) -> Any:
    from vdcore.integrations.mask_names import parse_mask

    T, rows, columns = (n // p for n, p in zip((frames, size, size), model.patch))
    return parse_mask(name, (T, rows, columns))


def _given(value: Any, **changes: Any) -> Any:
    """A dataclass with those changes that are not None."""
    return replace(value, **{name: change for name, change in changes.items() if change is not None})


class Meter:
    """Shows the progress of training: a bar on a terminal, elsewhere a line every 20 s."""

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
