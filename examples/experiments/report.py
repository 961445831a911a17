"""report.html and summary.json from the figures of a folder: one page with everything in it, that opens offline."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS
from experiments.figure import Figure
from vdcore_bench.report.page import PICTURES, heading, image, note, page, titled, write_whole
from vdcore_bench.report.table import Markup, Table, escaped

ABOUT = (
    "vdcore is an attention engine for video diffusion models. Each experiment makes one claim about what that is good "
    "for, which the numbers measured on this machine may refute: the last column says whether it holds. Models are "
    "small and train in minutes; a claim is about a mechanism, not about the beauty of pictures. Below stand, for each "
    "experiment, what was done, the numbers and what they are compared with, the pictures, and how small it is."
)


def figures(folder: Path) -> list[Figure]:
    """Those that are there, in the order of the report."""
    return [Figure.load(path) for name in EXPERIMENTS if (path := folder / f"{name}.json").is_file()]


def write(folder: Path, failed: dict[str, str] | None = None) -> tuple[Path, Path]:
    """``report.html`` and ``summary.json`` of the figures in the folder, each whole or not at all.

    Args:
        failed: experiments that raised, with what they said.
    """
    found, failed = figures(folder), failed or {}
    there = {figure.name for figure in found}
    summary = {
        "passed": bool(found) and all(figure.passed for figure in found) and not failed,
        "figures": {f.name: {name: x for name, x in vars(f).items() if name != "table"} for f in found},
        "failed": failed,
        "missing": [name for name in EXPERIMENTS if name not in there and name not in failed],
    }
    rows: list[tuple[str, ...]] = [
        (Markup(f'<a href="#{f.name}">{f.name}</a>'), f.claim, _verdict(f.passed)) for f in found
    ]
    rows += [(name, why, Markup('<span class="no">failed</span>')) for name, why in failed.items()]
    claims = Table.of(("experiment", "claim", "holds here"), rows, text=True)
    sections = [note(ABOUT), claims.html(), *(part for figure in found for part in _section(figure, folder))]
    paths = folder / "report.html", folder / "summary.json"
    write_whole(paths[0], page("vdcore demo", sections, "What vdcore is for, measured"))
    write_whole(paths[1], json.dumps(summary, indent=1) + "\n")
    return paths


def _verdict(passed: bool) -> Markup:
    return Markup('<span class="yes">yes</span>' if passed else '<span class="no">no</span>')


def _section(figure: Figure, folder: Path) -> Iterable[str]:
    """Pictures are embedded, videos too where a browser shows them as pictures."""
    yield heading(Markup(f"{figure.name.replace('_', ' ')}: {_verdict(figure.passed)}"), anchor=figure.name)
    yield f"<p><b>{escaped(figure.claim)}</b></p>"
    yield from _about(figure.name)
    numbers = {"measured": figure.numbers, "compared with": figure.compared_with}
    yield (
        '<div class="two">' + "".join(Table.of((title, ""), _flat(x)).html() for title, x in numbers.items()) + "</div>"
    )
    pictures = [name for name in figure.files if Path(name).suffix in PICTURES]
    for name in pictures:
        caption = figure.captions.get(name, "")
        yield image(folder / name, caption, pixels=name.endswith(".gif")) + note(caption)
    if figure.table is not None:
        yield titled(figure.table)
    yield note(figure.size)
    others = [name for name in figure.files if name not in pictures]
    yield note(f"Beside this page: {', '.join(others)}" if others else "")


def _about(name: str) -> Iterable[str]:
    """What the experiment's own module says that it does, as paragraphs; its first line is a title."""
    _, *paragraphs = (inspect.getdoc(importlib.import_module(f"experiments.{name}")) or "").split("\n\n")
    for paragraph in paragraphs:
        yield "<p>" + re.sub(r"``(.+?)``", r"<code>\1</code>", escaped(paragraph)) + "</p>"


def _flat(values: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}: ")
        else:
            text = ", ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else value
            yield (before + str(name)).replace("_", " "), f"{text:.4g}" if isinstance(text, float) else text
