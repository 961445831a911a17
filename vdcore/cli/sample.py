"""``vdcore sample``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vdcore.cli.options import THREADS, set_threads
from vdcore.cli.shared import DEVICE, TRAIN_OUT, plain_errors

if TYPE_CHECKING:
    from vdcore.diffusion.measure import Comparison, Continued


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="What vdcore train left.")] = TRAIN_OUT / "checkpoint.safetensors",
    out: Annotated[Path, typer.Option(help="Folder for videos, contact sheet and measures.")] = Path("out/sample"),
    count: Annotated[int, typer.Option(min=1, help="Videos.")] = 32,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Per video; more than in training are spliced from clips.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Frames that a spliced clip takes over from the last.")] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the sampler; default: the best that train measured, else 8.")
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of the files.")] = 8.0,
    kind: Annotated[str, typer.Option("--format", help="mp4 or gif.")] = "mp4",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    threads: THREADS = None,
    device: DEVICE = "cpu",
) -> None:
    """Samples videos, and measures them against clips that the model was not shown.

    Leaves sample-00.mp4 and so on, samples.png with real clips in its upper rows, and measures.json.
    """
    from vdcore.diffusion import best_steps, runs
    from vdcore.diffusion.measure import REAL_CLIPS, against, measure_continued
    from vdcore.diffusion.training import load_trained
    from vdcore.video.files import contact_sheet, write_video
    from vdcore_bench.report.terminal import progress

    if kind not in ("mp4", "gif"):
        raise typer.BadParameter(f"{kind}: not known; known are mp4, gif", param_hint="--format")
    set_threads(threads)
    with plain_errors():
        trained = load_trained(checkpoint, device)
        best = best_steps.load(checkpoint, trained.step) or best_steps.BestSteps()
        with progress() as bar:
            task = bar.add_task("sampling", total=frames or trained.recipe.frames)
            videos = runs.draw_videos(
                trained,
                count,
                frames=frames,
                steps=steps or best.draw,
                overlap=overlap,
                seed=seed,
                device=device,
                on_clip=lambda done, of: bar.update(task, completed=done, total=of),
            )
        for i, video in enumerate(videos):
            write_video(out / f"sample-{i:02d}.{kind}", video, fps, scale=8)
        real = runs.real_clips(trained, max(count, REAL_CLIPS))
        rows = [] if real is None else list(real[:4])
        samples = list(videos[:8, :, : trained.recipe.frames])
        labels = ["real"] * len(rows) + ["sample"] * len(samples)
        contact_sheet(out / "samples.png", rows + samples, labels=labels)
        print(f"{count} videos of {videos.shape[2]} frames by {steps or best.draw} steps, and samples.png in {out}")
        if real is None:
            print("not measured: the clips of training are not here", file=sys.stderr)
        elif min(videos.shape[2], real.shape[2]) > 1:
            more = runs.continue_clips(trained, real, steps=steps or best.go_on, seed=seed, device=device)
            found = {} if more is None else measure_continued(real, *more)
            _report(against(real)(videos), found, out / "measures.json", trained.step)


def _report(found: Comparison, continued: dict[str, Continued], path: Path, step: int) -> None:
    """Prints the measures and writes them as JSON."""
    from rich.console import Console
    from rich.table import Table

    from vdcore.diffusion.measure import goes_on_better

    table = Table("measure", "samples", "real clips", box=None)
    for name, value in found.samples.items():
        table.add_row(name, f"{value:.4g}", f"{found.real[name]:.4g}")
    table.add_row("temporal_fid", f"{found.temporal_fid:.4g}", f"{found.temporal_fid_of_real:.4g} (half against half)")
    if found.temporal_fid_interval is not None:
        low, high = found.temporal_fid_interval
        table.add_row("  of many clips", f"{low:.4g} to {high:.4g}", "(95 %, by leaving out one clip after the other)")
    console = Console(highlight=False)
    console.print(table)
    verdict = "yes" if found.moves_as_real else "no"
    print(
        f"moves as real clips do (warping error at most twice theirs, mean flow between half and twice): {verdict}; "
        f"warping error {found.error_ratio:.2f} x, mean flow {found.motion_ratio:.2f} x"
    )
    ratios = {name: getattr(found, name) for name in ("error_ratio", "motion_ratio", "moves_as_real")}
    written = {"step": step, **vars(found), **ratios}
    if continued:
        table = Table("first half of a real clip, then", "warping error", "squared difference", box=None)
        for name, one in continued.items():
            table.add_row(name, f"{one.warping_error:.4g}", f"{one.difference:.4g}")
        console.print(table)
        verdict = "yes" if goes_on_better(continued) else "no"
        print(f"goes on better than what takes no model (warping error along the real clips' flow): {verdict}")
        written["continued"] = {name: vars(one) for name, one in continued.items()}
    path.write_text(json.dumps(written, indent=1) + "\n")
