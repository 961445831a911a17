"""The tables of the README, made from the backends and from the results that are committed under bench/results.

``vdcore bench --readme README.md`` fills whatever stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vdcore.bench import block, curves, masks, summary
from vdcore.bench.doctor import operator_table
from vdcore.bench.results import Row, parse

_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
RESULTS = Path("bench") / "results"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A Markdown table; numbers to the right, ``text`` to the left."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = ["---"] + ["---" if text else "---:"] * (len(header) - 1)
    return "\n".join([line(header), line(ruler), *map(line, rows)]) + "\n"


def committed(root: Path) -> list[Row]:
    """The newest row of every measurement in ``bench/results`` of the repository."""
    rows = [row for file in sorted((root / RESULTS).rglob("*.jsonl")) for row in parse(file.read_text())]
    newest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        key = (*row.key(), row.versions.get("cpu"), row.versions.get("gpu"))
        newest[key] = row
    return list(newest.values())


def operators(root: Path) -> str:
    """Operators x backends: forward, backward."""
    table = operator_table()
    names = list(next(iter(table.values())))
    rows = ((f"`{op}`", *(has[name] or "-" for name in names)) for op, has in table.items())
    return markdown(("operator", *(f"`{name}`" for name in names)), rows, text=True)


def _results(device: str) -> Callable[[Path], str]:
    def made(root: Path) -> str:
        rows = [row for row in committed(root) if row.device.startswith(device) and not curves.is_profile(row)]
        if not any(row.status == "ok" for row in rows):
            return "No results of such a machine are committed.\n"
        found = [line for line in summary.lines(rows) if line.ours is not None]
        parts = [_machine(rows)]
        bars = summary.bars(found)
        if bars:
            parts.append(markdown(summary.BAR_HEADER, map(summary.bar_cells, bars)))
        header = ("operator", *summary.HEADER)
        parts.append(markdown(header, ((_operator(line), *summary.cells(line)) for line in found)))
        parts.append(f"{summary.LEGEND}\n")
        return "\n".join(parts)

    return made


def _operator(line: summary.Line) -> str:
    return f"`{line.job.op}`" + ("" if line.job.case == "plain" else f", {line.job.case}")


def _machine(rows: Sequence[Row]) -> str:
    last = max(rows, key=lambda row: row.time)
    v = last.versions
    where = v.get("gpu") if last.device.startswith("cuda") else f"{v.get('cpu')} ({v.get('isa')})"
    threads = max(row.threads or 1 for row in rows)
    return f"{where}, {threads} threads, torch {v.get('torch')}, commit {last.commit}, {last.time[:10]}.\n"


def memory(root: Path) -> str:
    """The profiles: peak memory and time against frames."""
    rows = [row for row in committed(root) if not curves.is_model(row)]
    parts = [f"{grid.title}\n\n{markdown(('frames', *grid.columns), grid.rows)}" for grid in curves.grids(rows)]
    return "\n".join([*parts, f"{curves.LEGEND}\n"]) if parts else "No profile is committed.\n"


def models(root: Path) -> str:
    """Whole models and blocks of them against frames: ``vdcore profile --model``."""
    made = curves.model_cells(committed(root))
    none = "No profile of a model is committed.\n"
    return f"{markdown(curves.MODEL_HEADER, made)}\n{curves.LEGEND}\n" if made else none


def mask_tables(root: Path) -> str:
    """Time per visible pair of frame masks."""
    made = masks.tables(committed(root))
    parts = [f"{title}\n\n{markdown(masks.HEADER, cells)}" for title, cells in made.items()]
    return "\n".join([*parts, f"{masks.LEGEND}\n"]) if parts else "No sweep over masks is committed.\n"


def blocks(root: Path) -> str:
    """A whole V-DiT block."""
    made = block.cells(committed(root))
    return markdown(block.HEADER, made) if made else "No results of a block are committed.\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "operators": operators,
    "cpu": _results("cpu"),
    "gpu": _results("cuda"),
    "masks": mask_tables,
    "block": blocks,
    "memory": memory,
    "models": models,
}


def fill(text: str, root: Path) -> str:
    """The text with every marked table made anew.

    Args:
        root: the repository.

    Raises:
        ValueError: if a table's name is none of :data:`TABLES`, or its end is missing.
    """

    def made(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"table {name!r} is not known; known are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](root)}{end}"

    filled, count = _MARKED.subn(made, text)
    if count != text.count("<!-- table:"):
        raise ValueError("a table has no <!-- /table -->")
    return filled
