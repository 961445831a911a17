"""``vdcore demo``."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer


def demo(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments, or all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures, pictures, videos and report.html.")] = Path("out/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Make again what is there already.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
) -> None:
    """What this engine is for, measured: experiments of minutes, one figure a claim, and a report that opens offline.

    Figures that are in --out already are kept, unless --fresh; an interrupt loses only the experiment at hand, and of
    training nothing. Exit code 1 if a claim does not hold.
    """
    import torch

    from vdcore.demo import report
    from vdcore.demo.experiments import EXPERIMENTS, load

    wanted = list(dict.fromkeys(names or ["all"]))
    unknown = [name for name in wanted if name not in (*EXPERIMENTS, "all")]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not known; known are all, {', '.join(EXPERIMENTS)}")
    if "all" in wanted:
        wanted = list(EXPERIMENTS)
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for name in wanted:
        path = out / f"{name}.json"
        if path.is_file() and not fresh:
            print(f"{name}: there already")
            continue
        path.unlink(missing_ok=True)
        if fresh and name == "train_sample":
            _forget_training(out)
        begin = time.monotonic()
        try:
            figure = load(name)(out)
        except KeyboardInterrupt:
            report.write(out, failed)
            print("interrupted: the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:  # one experiment's failure must not cost the others
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        verdict = "holds" if figure.passed else "DOES NOT HOLD"
        print(f"{name}: {verdict} ({time.monotonic() - begin:.0f} s): {figure.claim}")
    html, summary = report.write(out, failed)
    print(f"{html} and {summary.name}")
    if failed or not all(figure.passed for figure in report.figures(out) if figure.name in wanted):
        raise typer.Exit(1)


def _forget_training(out: Path) -> None:
    from vdcore.demo.train_sample import FOLDER
    from vdcore.diffusion.runs import CHECKPOINT

    (out / FOLDER / CHECKPOINT).unlink(missing_ok=True)
