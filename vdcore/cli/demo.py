"""``vdcore demo``: runs the experiments in ``examples/experiments``, which a checkout has and a wheel does not."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from vdcore.cli.options import THREADS, known, set_threads
from vdcore.cli.shared import plain_errors

EXAMPLES = Path(__file__).parents[2] / "examples"


def demo(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments, or all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures, pictures, videos and report.html.")] = Path("out/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat experiments whose figures are in --out.")] = False,
    threads: THREADS = None,
) -> None:
    """What this engine is for, measured: experiments of minutes, one figure per claim, and a report that opens offline.

    Figures that are in --out already are kept, unless --fresh; an interrupt loses only the experiment at hand, and of
    training nothing. Exit code 1 if a claim does not hold.
    """
    _find_experiments()
    from experiments import EXPERIMENTS, load, report, train_sample

    wanted = list(dict.fromkeys(known("NAMES", names or ["all"], ["all", *EXPERIMENTS])))
    if "all" in wanted:
        wanted = list(EXPERIMENTS)
    set_threads(threads)
    with plain_errors():
        out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for name in wanted:
        path = out / f"{name}.json"
        if path.is_file() and not fresh:
            print(f"{name}: there already")
            continue
        path.unlink(missing_ok=True)
        if fresh and name == train_sample.NAME:
            train_sample.checkpoint(out).unlink(missing_ok=True)
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


def _find_experiments() -> None:
    """Makes the package ``experiments`` importable, after everything else, so that it hides no other package."""
    if not (EXAMPLES / "experiments" / "__init__.py").is_file():
        print(
            "vdcore demo: the experiments are not in the package: clone the repository, and there run `make demo`",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
