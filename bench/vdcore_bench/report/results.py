"""The tables of any rows, and the report of a run: plots and report.html."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vdcore_bench.measure.journal import GRID_MASKS, MASKS, Row
from vdcore_bench.report import curves, page, pictures, said, summary
from vdcore_bench.report.table import Table
from vdcore_bench.suites import gpu, gradients, grid_masks, kept, masks, ranks, tangents
from vdcore_bench.suites.models import block, given, hosts, step_tables

# ---- Tables ----


def measured(title: str, rows: Sequence[Row]) -> list[Table]:
    """The tables of a part of a run; operators under its title, the other suites under their own."""
    found = [line for line in summary.lines(rows) if line.ours or line.backends or line.peers]
    return ([job_table(found, title)] if found else []) + [table for section in others(rows) for table in section]


def job_table(found: Iterable[summary.Line], title: str = "", code: str = "") -> Table:
    """A line per job.

    Args:
        code: what stands around an operator's name.
    """
    cells = ((f"{code}{line.job.op}{code}{summary.case_of(line)}", *summary.cells(line)) for line in found)
    return Table.of(("operator", *summary.HEADER), cells, title)


def bar_table(found: Sequence[summary.Line]) -> Table:
    cells = map(summary.bar_cells, summary.bars(found))
    return Table.of(summary.BAR_HEADER, cells, "Temporal attention over all workloads that were measured")


def absent(found: Sequence[summary.Line]) -> Table:
    cells = ((", ".join(who), why) for why, who in summary.absent(found).items())
    return Table.of(("who", "why"), cells, "Not measured", text=True)


def overhead_table(rows: Sequence[Row]) -> Table:
    cells = summary.overhead_cells(rows)
    return Table.of(summary.OVERHEAD_HEADER, cells, "Time of a call on 16 tokens, one thread")


def tangents_table(rows: Sequence[Row]) -> Table:
    return Table.of(tangents.HEADER, tangents.cells(rows), "Jacobian-vector products, forward included")


def mask_tables(rows: Sequence[Row]) -> list[Table]:
    return _with_note(
        [Table.of(masks.HEADER, cells, title) for title, cells in masks.tables(rows).items()], masks.LEGEND
    )


def grid_mask_tables(rows: Sequence[Row]) -> list[Table]:
    """One table a race."""
    found = [Table.of(grid_masks.HEADER, grid_masks.cells(race), race.title) for race in grid_masks.races(rows)]
    return _with_note(found, grid_masks.LEGEND)


def kept_tables(rows: Sequence[Row]) -> list[Table]:
    """What masks keep of a model's attention, and the mask that every head is recommended; two for a model."""
    found = []
    for model in kept.models(rows):
        found.append(Table.of(kept.HEADER, kept.cells(model), model.title))
        title = f"{model.name}: masks that keep {model.keep:.0%} in every head"
        found.append(Table.of(kept.CHOICE_HEADER, kept.choice_cells(model), title, text=True))
    return _with_note(found, kept.LEGEND)


def head_tables(rows: Sequence[Row]) -> list[Table]:
    """Every head of the models that masks were tried on."""
    found = []
    for model in kept.models(rows):
        header, cells = kept.head_cells(model)
        found.append(Table.of(header, cells, f"{model.name}: mass / worst 1 % / error of every head"))
    return found


def block_table(rows: Sequence[Row]) -> Table:
    return Table.of(block.HEADER, block.cells(rows), "A V-DiT block")


def swap_table(rows: Sequence[Row]) -> Table:
    swapped = [row for row in rows if row.op in ("model", "block") and not curves.is_profile(row)]
    return Table.of(hosts.HEADER, hosts.cells(swapped), "Models before and after the swap")


def step_tables_of(rows: Sequence[Row]) -> list[Table]:
    """Denoising steps: the numbers, and what to know about them."""
    table = Table.of(step_tables.HEADER, step_tables.cells(rows), "A denoising step", note=step_tables.LEGEND)
    notes = Table.of(step_tables.NOTES, step_tables.notes(rows), "What ran in these steps", text=True)
    return [one for one in (table, notes) if one.rows]


def ranks_table(rows: Sequence[Row]) -> Table:
    note = "Bytes and memory of the rank with most, counted. ~: time predicted for the link, without overlap."
    return Table.of(ranks.HEADER, ranks.cells(rows), "Models on several ranks", note=note)


def gradients_table(rows: Sequence[Row]) -> Table:
    title = "Errors of gradients: RMS of the difference from float64's over theirs, the worst of q, k and v"
    return Table.of(gradients.HEADER, gradients.cells(rows), title)


def frames_table(rows: Sequence[Row]) -> Table:
    """Of models of the user's own."""
    cells = [
        (row.workload, given.name_of(row), row.mode, row.dtype, row.device, row.case, given.frames_text(row))
        for row in rows
        if row.metric == "frames"
    ]
    header = ("model", "who", "mode", "dtype", "device", "frames that", "are")
    return Table.of(header, cells, "The most frames", note="By runs on fake tensors, within 2 %, weights left out.")


def profile_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per workload and pattern: frames down, attentions across, each as peak memory and time."""
    grids = curves.grids(rows)
    return _with_note([Table.of(("frames", *g.columns), g.rows, g.title) for g in grids], curves.LEGEND)


def _with_note(tables: list[Table], note: str) -> list[Table]:
    """The last table explains them all."""
    return [*tables[:-1], *(replace(table, note=note) for table in tables[-1:])]


def others(rows: Sequence[Row]) -> Iterator[list[Table]]:
    """The tables of every suite but the operators'; suites without rows are left out."""
    singles = (overhead_table, tangents_table, gradients_table, block_table, swap_table, ranks_table, frames_table)
    for one in (table(rows) for table in singles):
        if one.rows:
            yield [one]
    of_masks = (mask_tables(rows), grid_mask_tables(rows), kept_tables(rows))
    for several in (step_tables_of(rows), gpu.tables(rows), *of_masks, profile_tables(rows)):
        if several:
            yield several


def unmeasured(rows: Iterable[Row], statuses: Sequence[str] = ("predicted", "skipped", "failed")) -> Table:
    """Points over frames and of masks without a number of their own, and why."""
    cells = [
        (f"{summary.name_of(row)}, {row.case.removeprefix(curves.PROFILE)}", row.x, row.metric, row.status, row.reason)
        for row in rows
        if row.status in statuses and (curves.is_profile(row) or row.case.startswith((MASKS, GRID_MASKS)))
    ]
    header = ("point", "frames", "metric", "status", "why")
    return Table.of(header, cells, "What did not run, and what it would need", text=True)


def every_row(found: Iterable[summary.Line]) -> Table:
    cells = [
        (
            f"{line.job.op}{summary.case_of(line)}, {line.job.workload}, {line.job.dtype}, {line.job.mode}",
            line.job.scaling,
            summary.name_of(row),
            summary.time_of(row, spread=True),
            str(row.samples),
            summary.error_text(row),
            "-" if row.page_faults is None else f"{row.page_faults:.0f}",
            row.reason,
        )
        for line in found
        for row in (line.ours, *line.backends, line.copy, *line.peers)
        if row is not None
    ]
    header = ("job", "scaled", "provider", "time", "samples", "error", "page faults", "note")
    return Table.of(header, cells, "Every measurement")


# ---- The report ----


def report(rows: Sequence[Row], drawn: pictures.Pictures, noise: str = "") -> str:
    """The page, from what a reader wants first: what won and lost, pictures, tables by operator, all rows, the machine.

    ``drawn`` are PNGs by file stem, with their titles; those of the profile begin with profile.
    """
    found = summary.lines(rows)
    images = {name: page.image(png, title) for name, (title, png) in drawn.items()}
    parts = ["".join(map(page.said, said.sentences(rows))) + page.note(noise if rows else "There are no rows.")]
    wrong = summary.wrong(found)
    if wrong:
        parts.append("<ul>" + "".join(f'<li class="no">{page.escaped(x)}</li>' for x in wrong) + "</ul>")
    parts += images.values()
    if summary.bars(found):
        parts.append(page.titled(bar_table(found), 2))
    if found:
        parts.append(page.heading("Operators") + page.note(summary.LEGEND))
        parts += [
            page.titled(Table.of(summary.HEADER, map(summary.cells, group), title))
            for title, group in summary.groups(found).items()
        ]
    for tables in others(rows):
        parts += [page.titled(table, 2) for table in tables]
    for table in (*head_tables(rows), unmeasured(rows), absent(found)):
        if table.rows:
            parts.append(page.titled(table, 2))
    every = every_row(found)
    if every.rows:
        parts.append(page.heading(every.title) + page.folded(f"{len(every.rows)} rows", every.html()))
    if rows:
        parts.append(page.heading("Machine and versions") + _machine(rows).html())
    return page.page("vdcore benchmark", parts)


def _machine(rows: Sequence[Row]) -> Table:
    last = rows[-1]
    facts = [(name, str(value)) for name, value in last.versions.items() if value]
    facts += [("commit", str(last.commit)), ("threads", str(last.threads)), ("measured until", last.time)]
    allocators = [*dict.fromkeys(row.allocator for row in rows if row.status == "ok")]
    facts += [("allocator", allocator) for allocator in allocators[:3]]
    if len(allocators) > 3:
        facts += [("allocator", f"{len(allocators) - 3} more, in results.jsonl")]
    return Table.of(("machine", ""), facts, text=True)


def write(rows: Sequence[Row], out: Path, noise: str = "") -> list[Path]:
    """PNG plots and ``report.html`` into the folder; returns their paths. ``noise`` is the report's first line."""
    drawn = pictures.draw(rows)
    written = []
    for name, (_, png) in drawn.items():
        written.append(out / f"{name}.png")
        written[-1].write_bytes(png)
    written.append(out / "report.html")
    page.write_whole(written[-1], report(rows, drawn, noise))
    return written
