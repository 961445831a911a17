"""The tables of README.md and docs/, made from the backends and from the results committed under bench/results.

``vdcore bench --readme README.md`` fills what stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``: in that
file and in the pages of docs/ beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vdcore.ops.choose import BACKENDS, Backend
from vdcore_bench.jobs import operator_table
from vdcore_bench.measure.journal import GRID_MASKS, MASKS, Row, newest, parse
from vdcore_bench.report import curves, results, summary
from vdcore_bench.report.table import Table
from vdcore_bench.suites.gradients import METRIC as GRADIENT_ERROR
from vdcore_bench.suites.models import block, step_tables

_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
RESULTS = Path("bench") / "results"

# Operator, workload, dtype and mode of the README's rows: what the engine is for, what is about even, and a loss.
HEADLINE = (
    ("temporal_attention", "latte-1-512", "bfloat16", "fwd"),
    ("video_attention", "long-video-60f", "float32", "fwd+bwd"),
    ("patchify", "latte-1-512", "float32", "fwd"),
    ("spatial_attention", "latte-1-512", "float32", "fwd+bwd"),
    ("video_attention", "wan2.2-5b-704p", "float32", "fwd"),
)
HEADLINE_HEADER = ("operator", "workload", "dtype, mode")
MOST_LOSSES = 4  # that the README names of a machine
MACHINE = ("cpu", "isa", "gpu")  # the versions that tell machines apart


def committed(root: Path) -> list[Row]:
    """The newest row of every measurement in ``bench/results`` of the repository."""
    rows = [row for file in sorted((root / RESULTS).rglob("*.jsonl")) for row in parse(file.read_text())]
    in_time = sorted(rows, key=lambda row: row.time)
    return newest(in_time, lambda row: (*row.key(), *_machine_of(row)))


def operators(root: Path) -> str:
    """Operators x backends: forward, backward; and the devices and dtypes of each backend."""
    table = operator_table()
    rows = [(f"`{op}`", *(has[name] or "-" for name in BACKENDS)) for op, has in table.items()]
    rows.append(("*tensors on*", *(backend.device for backend in BACKENDS.values())))
    rows.append(("*dtypes*", *map(_dtypes, BACKENDS.values())))
    return Table.of(("operator", *(f"`{name}`" for name in BACKENDS)), rows, text=True).markdown()


def _dtypes(backend: Backend) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes) or "every float"


def _machine_of(row: Row) -> tuple[str | None, ...]:
    return tuple(row.versions.get(name) for name in MACHINE)


def _measured(root: Path, device: str) -> list[Row]:
    rows = [row for row in committed(root) if row.device.startswith(device) and not curves.is_profile(row)]
    elsewhere = (MASKS, GRID_MASKS)  # these, steps and errors of gradients have tables of their own
    rows = [row for row in rows if row.op != step_tables.OP and row.metric != GRADIENT_ERROR]
    return [row for row in rows if not row.case.startswith(elsewhere)]


def _by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of every machine, those of the last one first: times of two machines never stand in one table."""
    found: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(_machine_of(row), []).append(row)
    return sorted(found.values(), key=lambda rows: max(row.time for row in rows), reverse=True)


def _timed(root: Path, device: str) -> list[list[Row]]:
    """The rows of every machine on which an operator was timed."""
    machines = _by_machine(_measured(root, device))
    return [rows for rows in machines if any(line.ours for line in summary.lines(rows))]


def headline(root: Path) -> str:
    """The rows of :data:`HEADLINE`, a column for every machine, and how to measure them again."""
    machines = _timed(root, "cpu")
    columns: dict[str, dict[tuple[str, ...], summary.Line]] = {}
    for rows in machines:
        found = columns.setdefault(_where(rows), {})
        for line in summary.lines(rows):
            job = line.job
            if line.speedup is not None and "norm" not in job.case:
                found.setdefault((job.op, job.workload, job.dtype, job.mode), line)
    shown = [key for key in HEADLINE if any(key in found for found in columns.values())]
    if not shown:
        return "No results of a CPU are committed.\n"
    cells = [_headline_cells([found.get(key) for found in columns.values()]) for key in shown]
    ops = ",".join(dict.fromkeys(op for op, *_ in shown))
    noise = [text for rows in machines for text in _noise(rows)]
    again = "".join(map(_machine, machines)) + f"`vdcore bench --op {ops}` measures them again.\n"
    return "\n".join([*noise, Table.of((*HEADLINE_HEADER, *columns), cells).markdown(), again])


def _headline_cells(lines: Sequence[summary.Line | None]) -> tuple[str, ...]:
    """The job, and for every machine our time, the best peer's over it and its name, and the error ratio."""
    one = next(line for line in lines if line is not None)

    def cell(line: summary.Line | None) -> str:
        if line is None:
            return "-"
        who = summary.name_of(line.best) if line.best else "-"
        times = f"{summary.time_of(line.ours)}, **{summary.speedup_text(line)}** {who}"
        return f"{times}, {summary.error_text(line.ours)}"

    return (_operator(one), one.job.workload, f"{one.job.dtype}, {one.job.mode}", *map(cell, lines))


def losses(root: Path) -> str:
    """The measured jobs in which the best peer is faster, a line for every machine, the worst ones first."""
    parts = []
    for rows in _timed(root, "cpu"):
        found = [line for line in summary.lines(rows) if line.speedup is not None]
        lost = sorted((line for line in found if (line.speedup or 0) < 1), key=lambda line: line.speedup or 0)
        named = [
            f"{_operator(line)}, {line.job.workload}, {line.job.dtype}, {line.job.mode}: {summary.speedup_text(line)}"
            for line in lost[:MOST_LOSSES]
        ]
        if len(lost) > MOST_LOSSES:
            named.append(f"{len(lost) - MOST_LOSSES} more, less far behind")
        count = f"the best peer is faster in {len(lost)} of {len(found)} jobs"
        parts.append(f"- {_where(rows)}: {count}{': ' if named else ''}{'; '.join(named)}.\n")
    return "".join(parts)


def _results(device: str) -> Callable[[Path], str]:
    def made(root: Path) -> str:
        parts = []
        for rows in _timed(root, device):
            found = [line for line in summary.lines(rows) if line.ours is not None]
            parts += [*_noise(rows), _machine(rows)]
            tables = (results.bar_table(found), results.job_table(found, code="`"))
            parts += [table.markdown() for table in tables if table.rows]
        return "\n".join([*parts, f"{summary.LEGEND}\n"]) if parts else "No results of such a machine are committed.\n"

    return made


def _operator(line: summary.Line) -> str:
    return f"`{line.job.op}`{summary.case_of(line)}"


def _noise(rows: Sequence[Row]) -> list[str]:
    """The first line, if these rows are noisy."""
    said = summary.noise(rows)
    return [f"{said}\n"] if said else []


def _where(rows: Sequence[Row]) -> str:
    v = rows[-1].versions
    return f"{v.get('gpu')}" if rows[-1].device.startswith("cuda") else f"{v.get('cpu')} ({v.get('isa')})"


def _machine(rows: Sequence[Row]) -> str:
    last = max(rows, key=lambda row: row.time)
    v = last.versions
    threads = max(row.threads or 1 for row in rows)
    return f"{_where(rows)}, {threads} threads, torch {v.get('torch')}, commit {last.commit}, {last.time[:10]}.\n"


def _of_each_machine(rows: Iterable[Row], made: Callable[[Sequence[Row]], list[Table]], otherwise: str) -> str:
    """What is made of every machine's rows: tables below their titles, and what the last one says of them.

    Args:
        otherwise: the text if there are no such rows.
    """
    parts = []
    for group in _by_machine(rows):
        tables = made(group)
        if not any(table.rows for table in tables):
            continue
        parts.append(_machine(group))
        parts += [f"{table.title}\n\n{table.markdown()}" if table.title else table.markdown() for table in tables]
        parts += [f"{tables[-1].note}\n"] if tables[-1].note else []
    return "\n".join(parts) if parts else f"{otherwise}\n"


def memory(root: Path) -> str:
    """The profiles: peak memory and time against frames."""
    rows = [row for row in committed(root) if curves.is_profile(row) and not curves.is_model(row)]
    return _of_each_machine(rows, results.profile_tables, "No profile is committed.")


def models(root: Path) -> str:
    """Whole models and blocks of them against frames: ``vdcore profile --model``."""

    def made(rows: Sequence[Row]) -> list[Table]:
        return [Table.of(curves.MODEL_HEADER, curves.model_cells(rows), note=curves.LEGEND)]

    rows = [row for row in committed(root) if curves.is_model(row)]
    return _of_each_machine(rows, made, "No profile of a model is committed.")


def _of_masks(prefix: str, made: Callable[[Sequence[Row]], list[Table]]) -> Callable[[Path], str]:
    """The tables of the cases of this prefix."""

    def tables(root: Path) -> str:
        rows = [row for row in committed(root) if row.case.startswith(prefix)]
        return _of_each_machine(rows, made, "No sweep over masks is committed.")

    return tables


def blocks(root: Path) -> str:
    """A whole V-DiT block."""
    rows = [row for row in committed(root) if row.op == block.OP]
    return _of_each_machine(rows, _untitled(results.block_table), "No results of a block are committed.")


def steps(root: Path) -> str:
    """Denoising steps of pipelines."""
    rows = [row for row in committed(root) if row.op == step_tables.OP]
    return _of_each_machine(rows, results.step_tables_of, "No step is committed.")


def gradients(root: Path) -> str:
    """Errors of gradients in half precision against tokens."""
    rows = [row for row in committed(root) if row.metric == GRADIENT_ERROR]
    return _of_each_machine(rows, _untitled(results.gradients_table), "No errors of gradients are committed.")


def _untitled(made: Callable[[Sequence[Row]], Table]) -> Callable[[Sequence[Row]], list[Table]]:
    """One table, whose page has a heading for it."""
    return lambda rows: [replace(made(rows), title="")]


TABLES: dict[str, Callable[[Path], str]] = {
    "operators": operators,
    "headline": headline,
    "losses": losses,
    "cpu": _results("cpu"),
    "gpu": _results("cuda"),
    "masks": _of_masks(MASKS, results.mask_tables),  # over frames
    "grid-masks": _of_masks(GRID_MASKS, results.grid_mask_tables),  # windows in frames, rows and columns
    "block": blocks,
    "steps": steps,
    "memory": memory,
    "models": models,
    "gradients": gradients,
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


def write(file: Path) -> None:
    """Fills a file of the repository's root, and the pages in docs/ beside it; where one is wrong, none is written.

    Raises:
        ValueError: as :func:`fill`.
    """
    root = file.resolve().parent
    filled = {page: fill(page.read_text(), root) for page in (file, *sorted((root / "docs").glob("*.md")))}
    for page, text in filled.items():
        page.write_text(text)
