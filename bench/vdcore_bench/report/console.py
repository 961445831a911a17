"""What a terminal shows: progress while a run goes on, and tables as its jobs are finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vdcore_bench.jobs.base import Job
from vdcore_bench.measure.journal import Row
from vdcore_bench.measure.memory import Point
from vdcore_bench.report import compare, curves, summary
from vdcore_bench.suites import masks
from vdcore_bench.suites.memory import pattern_of
from vdcore_bench.suites.runner import DTYPE_NAMES, Watch

WIDTH_OF_FILES = 220  # columns, where the output is not a terminal


def make_console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=WIDTH_OF_FILES)


def table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[RenderableType]] = (), text: bool = False
) -> RenderableType:
    """A table below its title. ``text``: words and no numbers, which are aligned to the right."""
    made = Table(header_style="dim", box=box.SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if text or i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return Group(Text(f"\n{title}\n", style="bold"), made)


class Screen(Watch):
    """Shows a run: a bar below, and above it the table that is growing."""

    def __init__(self, console: Console, title: str = "Operators") -> None:
        self.console, self.title, self.growing = console, title, Group()
        self._lines: list[summary.Line] = []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None)
        self._now = ""

    @contextmanager
    def live(self) -> Iterator[Screen]:
        """The display is up inside; what is unfinished at its end is printed as it stands."""
        renderable = Live(
            console=self.console,
            get_renderable=lambda: Group(self.growing, self._progress),
            refresh_per_second=4,
            transient=True,
        )
        with renderable:
            try:
                yield self
            finally:
                self.flush()
                self.growing = Group()

    def show(self, what: str, number: int, total: int) -> None:
        """A step of a run that has no jobs."""
        self._progress.update(self._task, description=what, completed=number, total=total)

    # ---- jobs ----

    def begin(self, job: Job, number: int, total: int) -> None:
        self._now = f"{job.op}, {job.case}, {job.workload.name}, {job.mode}, {DTYPE_NAMES[job.dtype]}"
        self.show(self._now, number, total)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=f"{self._now}: {what}" if self._now else what)

    def finish(self, job: Job, rows: list[Row]) -> None:
        # A job without a number has its reason below, in the summary.
        self._lines += [line for line in summary.lines(rows) if line.ours or line.backends or line.peers]
        self.growing = Group(job_table(self.title, self._lines))

    def flush(self) -> None:
        if self._lines:
            self.console.print(job_table(self.title, self._lines))
        self._lines, self._now = [], ""


def job_table(title: str, found: Sequence[summary.Line]) -> RenderableType:
    cells = ((line.job.op + summary.case_of(line), *summary.cells(line)) for line in found)
    return table(title, ("operator", *summary.HEADER), cells)


def bar_table(rows: Sequence[Row]) -> RenderableType:
    found = summary.bars(summary.lines(rows))
    title = "Temporal attention over all workloads that were measured"
    return table(title, summary.BAR_HEADER, map(summary.bar_cells, found))


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    """After the tables: what they mean, over all workloads, and who is missing and why."""
    found = summary.lines(rows)
    if not found:
        return
    console.print(Text(f"\n{summary.LEGEND}", style="dim"))
    overhead = summary.overhead_cells(rows)
    if overhead:
        console.print(table("Time of a call on 16 tokens, one thread", summary.OVERHEAD_HEADER, overhead))
    reasons = summary.absent(found)
    if reasons:
        console.print(table("Not measured", ("who", "why"), _swapped(reasons), text=True))
    if summary.bars(found):
        console.print(bar_table(rows))
        for bar in summary.bars(found):
            console.print(summary.bar_text(bar), soft_wrap=True)
    for line in summary.wrong(found):
        console.print(line, style="bold red", soft_wrap=True)


def _swapped(reasons: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(", ".join(who), why) for why, who in reasons.items()]


# ---- The profile ----


def profile_tables(rows: Sequence[Row]) -> list[RenderableType]:
    """One table a workload and pattern: frames down, attentions across, each as peak memory and time."""
    return [table(grid.title, ("frames", *grid.columns), grid.rows) for grid in curves.grids(rows)]


class ProfileScreen(Screen):
    """Shows a profile; ``rows`` are the journal's."""

    def __init__(self, console: Console, rows: list[Row]) -> None:
        super().__init__(console)
        self.rows = rows

    def at(self, point: Point, number: int, total: int) -> None:
        self.show(f"{pattern_of(point)}, {point.attention} {point.variant}, {point.frames} frames", number, total)

    def done(self, point: Point, rows: list[Row]) -> None:
        self.growing = Group(*profile_tables(self.rows))


def print_profile(console: Console, rows: Sequence[Row]) -> None:
    for made in profile_tables(rows):
        console.print(made)
    console.print(Text(curves.LEGEND, style="dim"))
    failed = [row for row in rows if curves.is_profile(row) and row.status not in ("ok", "predicted")]
    for row in failed:
        console.print(f"{row.provider} {row.variant}, {row.case}, {row.x:g} frames: {row.status}: {row.reason}")


def print_masks(console: Console, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.case.startswith(curves.MASKS) and row.status == "skipped":
            console.print(f"{row.case}, {row.dtype}, {row.x:g} frames: {row.reason}")
    for title, cells in masks.tables(rows).items():
        console.print(table(f"What a mask costs: {title}", masks.HEADER, cells))


# ---- Comparing ----


def print_comparison(console: Console, found: compare.Comparison) -> None:
    for note in found.notes:
        console.print(note, style="yellow", soft_wrap=True)
    rows = []
    for change in found.changes:
        style = {"faster": "green", "less": "green", "slower": "red", "more": "red"}.get(change.verdict, "dim")
        rows.append([Text(cell, style=style) for cell in compare.cells(change)])
    console.print(table("B over A", compare.HEADER, rows))
    for text in (*found.summary(), compare.LEGEND):
        console.print(text, soft_wrap=True)
