"""Plots and report.html from rows: one page that opens without a network, with everything in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from vdcore_bench.measure.journal import Row
from vdcore_bench.report import curves, summary
from vdcore_bench.report import pictures as plots
from vdcore_bench.suites import masks

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.5rem; } h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
table.text td { white-space: normal; }
img { max-width: 100%; background: white; border-radius: 4px; }
p.note { color: var(--dim); max-width: 80ch; } li.wrong { color: #c22; font-weight: 600; }
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _image(png: bytes, title: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'


def page(rows: Sequence[Row], pictures: dict[str, tuple[str, bytes]], noise: str = "") -> str:
    """The report: ``pictures`` are PNGs by file stem, with their titles; those of the profile begin with profile."""
    found = summary.lines(rows)
    parts = [f"<h1>vdcore benchmark</h1>{_note(noise) if noise else ''}{_machine(rows)}"]
    wrong = summary.wrong(found)
    if wrong:
        parts.append("<ul>" + "".join(f'<li class="wrong">{html.escape(x)}</li>' for x in wrong) + "</ul>")
    bars = summary.bars(found)
    if bars:
        parts.append("<h2>Temporal attention over all workloads</h2>")
        parts.append(_table(summary.BAR_HEADER, map(summary.bar_cells, bars)))
    parts += [_image(png, title) for name, (title, png) in pictures.items() if not name.startswith("profile")]
    if found:
        parts.append(f"<h2>Operators</h2>{_note(summary.LEGEND)}")
        for title, group in summary.groups(found).items():
            parts.append(f"<h3>{html.escape(title)}</h3>" + _table(summary.HEADER, map(summary.cells, group)))
    overhead = summary.overhead_cells(rows)
    if overhead:
        parts.append("<h2>Time of a call on 16 tokens, one thread</h2>" + _table(summary.OVERHEAD_HEADER, overhead))
    swept = masks.tables(rows)
    if swept:
        parts.append(f"<h2>What a mask costs</h2>{_note(masks.LEGEND)}")
        parts += [f"<h3>{html.escape(title)}</h3>" + _table(masks.HEADER, cells) for title, cells in swept.items()]
    grids = curves.grids(rows)
    if grids:
        parts.append(f"<h2>Memory and time against frames</h2>{_note(curves.LEGEND)}")
        parts += [_image(png, title) for name, (title, png) in pictures.items() if name.startswith("profile")]
        for grid in grids:
            parts.append(f"<h3>{html.escape(grid.title)}</h3>" + _table(("frames", *grid.columns), grid.rows))
        parts.append("<h3>What did not run, and what it would need</h3>")
        parts.append(_table(("point", "frames", "metric", "status", "why"), _unmeasured(rows), text=True))
    if found:
        absent = ((", ".join(who), why) for why, who in summary.absent(found).items())
        parts.append("<h2>Not measured</h2>" + _table(("who", "why"), absent, text=True))
        parts.append("<h2>Every measurement</h2>" + _table(_EVERY_HEADER, _every(found)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vdcore benchmark</title>\n'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _machine(rows: Sequence[Row]) -> str:
    if not rows:
        return _note("There are no rows.")
    last = rows[-1]
    facts = [(name, str(value)) for name, value in last.versions.items() if value]
    facts += [("commit", str(last.commit)), ("threads", str(last.threads)), ("measured until", last.time)]
    facts += [("allocator", "; ".join(dict.fromkeys(row.allocator for row in rows if row.status == "ok")))]
    return _table(("machine", ""), facts, text=True)


def _unmeasured(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        if curves.is_profile(row) and row.status != "ok":
            name = f"{row.provider} {row.variant}".strip() + ", " + row.case.removeprefix(curves.PROFILE)
            yield name, f"{row.x:g}", row.metric, row.status, row.reason


_EVERY_HEADER = ("job", "scaled", "provider", "time", "samples", "error", "page faults", "note")


def _every(found: Sequence[summary.Line]) -> Iterable[tuple[str, ...]]:
    for line in found:
        job = line.job
        what = f"{job.op}{summary.case_of(line)}, {job.workload}, {job.dtype}, {job.mode}"
        for row in (line.ours, *line.backends, line.copy, *line.peers):
            if row is not None:
                faults = "-" if row.page_faults is None else f"{row.page_faults:.0f}"
                time = summary.time_of(row, spread=True)
                error = summary.error_text(row)
                yield what, job.scaling, summary.name_of(row), time, str(row.samples), error, faults, row.reason


def write(rows: Sequence[Row], out: Path, noise: str = "") -> list[Path]:
    """PNG plots and ``report.html`` into the folder; returns their paths. ``noise`` is the report's first line."""
    pictures = plots.draw(rows)
    written = []
    for name, (_, png) in pictures.items():
        written.append(out / f"{name}.png")
        written[-1].write_bytes(png)
    written.append(out / "report.html")
    written[-1].write_text(page(rows, pictures, noise), encoding="utf-8")
    return written
