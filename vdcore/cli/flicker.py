"""``vdcore flicker``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdcore.cli.options import THREADS, set_threads
from vdcore.cli.shared import DEVICE, plain_errors

if TYPE_CHECKING:
    from torch import Tensor

    from vdcore.metrics import Flicker

WEIGHTS, WORST, SIDE = (0.0, 0.5, 1.0, 1.5), 3, 256


def flicker(
    target: Annotated[Path, typer.Argument(help="A video, or a checkpoint of vdcore train.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and numbers.")] = Path("out/flicker"),
    fps: Annotated[float | None, typer.Option(help="Of a video, so many frames per second.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Of a video, the first ones; of a model, per clip.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Of a model, clips.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the scheduler.")] = None,
    threads: THREADS = None,
    device: DEVICE = "cpu",
) -> None:
    """Says which frames flicker and where; of a model, also how much of it is its attention across frames' doing.

    Motion is taken out first: what counts is how a point that can be followed changes. Leaves flicker.json, and
    flicker.png: the change from frame to frame, and the worst frames with a map of where they change. For a model the
    same noise is denoised with attention across frames weaker, stronger, and in windows of other sizes.
    """
    from vdcore.metrics import frame_flicker
    from vdcore.video import read_clip

    set_threads(threads)
    with plain_errors():
        if target.suffix == ".safetensors":
            return _model(target, out, frames, count, steps, device)
        clip = read_clip(target, frames, fps=fps)
        height, width = clip.shape[2:]
        if min(height, width) > SIDE:  # flow of more pixels takes long, and tells no more
            scale = SIDE / min(height, width)
            clip = read_clip(target, frames, (round(height * scale), round(width * scale)), fps=fps)
        if clip.shape[1] < 2:
            raise ValueError(f"flicker: {target}: one frame does not flicker")
        (found,) = frame_flicker(clip[None])
        _say(found)
        out.mkdir(parents=True, exist_ok=True)
        _draw(out / "flicker.png", clip, found)
        (out / "flicker.json").write_text(json.dumps(_numbers(found), indent=1) + "\n")
    print(f"{out / 'flicker.png'}, {out / 'flicker.json'}")


def _numbers(found: Flicker) -> dict[str, Any]:
    worst = found.change.argsort(descending=True)[:WORST] + 1
    return {
        "change": found.change.tolist(),
        "brightness": found.brightness.tolist(),
        "odd_frames": list(found.odd),
        "worst": [{"frame": int(t), "row_column_share": found.place(int(t))} for t in worst],
    }


def _say(found: Flicker) -> None:
    middle = found.change.median()
    print(
        f"{len(found.change) + 1} frames; from one to the next {middle:.2f} of 255 gray levels, at the median, ", end=""
    )
    print("are not motion's")
    if not found.odd:
        print("no frame stands out")
    for t in found.odd:
        row, column, share = found.place(t)
        whole = abs(found.brightness[t - 1]) / found.change[t - 1].clamp(min=1e-6)
        where = (
            f"the whole picture, {'brighter' if found.brightness[t - 1] > 0 else 'darker'}"
            if whole > 0.7
            else f"{share:.0%} of it in row {row + 1}, column {column + 1} of 4 x 4"
        )
        print(f"frame {t}: {found.change[t - 1]:.2f}, {found.change[t - 1] / middle.clamp(min=1e-6):.1f} x; {where}")


def _draw(path: Path, clip: Tensor, found: Flicker) -> None:
    """The change over time, and the worst frames between their neighbors' place and their map."""
    from vdcore.extras import need

    figure = need("matplotlib.figure", "bench", "flicker").Figure(figsize=(9, 3 + 2 * WORST), layout="constrained")
    grid = figure.add_gridspec(1 + WORST, 3)
    axes = figure.add_subplot(grid[0, :])
    axes.plot(range(1, len(found.change) + 1), found.change.tolist(), linewidth=1)
    axes.plot(found.odd, [float(found.change[t - 1]) for t in found.odd], "o", label="stands out")
    axes.set(xlabel="frame", ylabel="change, gray levels", ylim=(0, None))
    if found.odd:
        axes.legend()
    for i, t in enumerate((found.change.argsort(descending=True)[:WORST] + 1).tolist()):
        pictures = (clip[:, t - 1], clip[:, t])
        for column, (name, picture) in enumerate(zip((f"frame {t - 1}", f"frame {t}"), pictures)):
            axis = figure.add_subplot(grid[1 + i, column])
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_title(name, fontsize=9)
            axis.axis("off")
        axis = figure.add_subplot(grid[1 + i, 2])
        axis.imshow(found.map[t - 1].numpy(), cmap="magma")
        axis.set_title("change that is not motion's", fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def _model(target: Path, out: Path, frames: int | None, count: int, steps: int | None, device: str) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from vdcore.diffusion import best_steps, runs
    from vdcore.diffusion.temporal_share import across_frames
    from vdcore.diffusion.training import load_trained
    from vdcore.mask import FrameMask
    from vdcore.metrics import frame_flicker, mean_flow
    from vdcore.video import contact_sheet

    trained = load_trained(target, device)
    tokens = trained.recipe.frames // trained.recipe.model.patch[0]
    kinds: dict[str, dict[str, Any]] = {f"weight {w:g}": {"weight": w} for w in WEIGHTS}
    if not trained.recipe.causal:
        kinds |= {
            f"window of {2 * r + 1} tokens": {"mask": FrameMask.symmetric(r)} for r in (1, 2) if 2 * r + 1 < tokens
        }
    best = best_steps.load(target, trained.step) or best_steps.BestSteps()
    drawing: dict[str, Any] = {"frames": frames, "steps": steps or best.draw, "device": device}
    rows: dict[str, dict[str, float]] = {}
    shown: list[Tensor] = []
    table = Table("attention across frames", "change, gray levels", "odd frames", "mean flow, pixels", box=None)

    def add(name: str, videos: Tensor) -> None:
        found = frame_flicker(videos)
        odd = sum(len(f.odd) for f in found) / len(found)
        change = float(torch.stack([f.change.mean() for f in found]).mean())
        rows[name] = {"change": change, "odd_frames": odd, "mean_flow": mean_flow(videos).mean().item()}
        table.add_row(name, f"{change:.2f}", f"{odd:.2f}", f"{rows[name]['mean_flow']:.3f}")
        shown.append(videos[0])

    real = runs.real_clips(trained, count)
    if real is not None and (frames is None or frames == trained.recipe.frames):
        add("real clips", real)
    for name, how in kinds.items():
        with across_frames(trained.model, **how):
            add(name, runs.draw_videos(trained, count, **drawing))
    if trained.recipe.hold:
        pt, clip = trained.recipe.model.patch[0], trained.recipe.frames
        for overlap in (pt, 2 * pt):
            if overlap < clip:
                videos = runs.draw_videos(trained, count, **{**drawing, "frames": 2 * clip - overlap}, overlap=overlap)
                add(f"spliced, {overlap} frames of overlap", videos)
                shown[-1] = shown[-1][:, : shown[0].shape[1]]
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(out / "flicker.png", shown, labels=list(rows))
    (out / "flicker.json").write_text(json.dumps(rows, indent=1) + "\n")
    Console(highlight=False).print(table)
    without, whole = rows["weight 0"]["change"], rows["weight 1"]["change"]
    share = 1 - whole / max(without, 1e-9)
    print(
        f"attention across frames takes away {share:.0%} of the change that is not motion's: {without:.2f} without it,"
    )
    print(f"{whole:.2f} with it")
    print(f"{out / 'flicker.png'}, {out / 'flicker.json'}")
