"""report.html and summary.json from the figures of a folder: one page with everything in it, that opens offline."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS
from experiments.figure import Figure, write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h2 { margin-top: 3rem; } h2 a { color: inherit; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 500; } td.number { text-align: right; }
img { max-width: 100%; background: white; border-radius: 4px; margin: .3rem 0; image-rendering: pixelated; }
img.plot { image-rendering: auto; }
.two { display: flex; flex-wrap: wrap; gap: 2rem; } .scroll { overflow-x: auto; }
p.note { color: var(--dim); max-width: 90ch; } .yes { color: #2a8a4a; } .no { color: #c22; font-weight: 600; }
"""
MIME = {".png": "image/png", ".gif": "image/gif"}


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
        "figures": {figure.name: vars(figure) for figure in found},
        "failed": failed,
        "missing": [name for name in EXPERIMENTS if name not in there and name not in failed],
    }
    return (
        write_whole(folder / "report.html", page(found, folder, failed)),
        write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n"),
    )


def page(found: Sequence[Figure], folder: Path, failed: dict[str, str]) -> str:
    """The report; pictures are embedded, videos too where a browser shows them as pictures."""
    rows = [
        f'<tr><td><a href="#{figure.name}">{figure.name}</a></td><td>{html.escape(figure.claim)}</td>'
        f"<td>{_verdict(figure.passed)}</td></tr>"
        for figure in found
    ]
    rows += [
        f'<tr><td>{html.escape(name)}</td><td>{html.escape(why)}</td><td class="no">failed</td></tr>'
        for name, why in failed.items()
    ]
    parts = ["<h1>What vdcore is for, measured</h1>"]
    parts.append("<table><tr><th>experiment</th><th>claim</th><th>holds here</th></tr>" + "".join(rows) + "</table>")
    parts += [_section(figure, folder) for figure in found]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vdcore demo</title>\n'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _verdict(passed: bool) -> str:
    return '<span class="yes">yes</span>' if passed else '<span class="no">no</span>'


def _section(figure: Figure, folder: Path) -> str:
    parts = [f'<h2 id="{figure.name}">{figure.name.replace("_", " ")}: {_verdict(figure.passed)}</h2>']
    parts.append(f"<p>{html.escape(figure.claim)}</p>")
    parts.append('<div class="two">' + _numbers("measured", figure.numbers))
    parts.append(_numbers("compared with", figure.compared_with) + "</div>")
    others = []
    for name in figure.files:
        path = folder / name
        if path.suffix in MIME:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            kind = ' class="plot"' if path.suffix == ".png" else ""
            parts.append(f'<p><img{kind} alt="{html.escape(name)}" src="data:{MIME[path.suffix]};base64,{data}"></p>')
        elif path.suffix == ".md":
            parts.append(_markdown(path.read_text(encoding="utf-8")))
        else:
            others.append(name)
    parts.append(f'<p class="note">{html.escape(figure.size)}</p>')
    if others:
        parts.append(f'<p class="note">Beside this page: {html.escape(", ".join(others))}</p>')
    return "\n".join(parts)


def _numbers(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name.replace("_", " "))}</td><td class="number">{html.escape(_text(value))}</td></tr>'
        for name, value in _flat(values)
    )
    return f"<table><tr><th>{title}</th><th></th></tr>{rows}</table>"


def _flat(values: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}: ")
        else:
            yield before + str(name), value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _markdown(text: str) -> str:
    """The paragraphs and pipe tables that :func:`~experiments.show.save_table` writes."""
    parts = []
    for block in text.strip().split("\n\n"):
        if not block.startswith("|"):
            parts.append(f'<p class="note">{html.escape(block)}</p>')
            continue
        lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in block.splitlines()]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
        body = "".join(
            "<tr>"
            + "".join(f"<td{' class=number' if i else ''}>{html.escape(c)}</td>" for i, c in enumerate(line))
            + "</tr>"
            for line in lines[2:]
        )
        parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
    return "\n".join(parts)
