"""A run in a terminal: progress and growing tables while it goes on, and a summary at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from vdcore_bench.measure.journal import Row, Watch
from vdcore_bench.report import compare, results, summary
from vdcore_bench.report.table import Table
from vdcore_bench.report.terminal import make_bars, print_table, shown


class Screen(Watch):
    """Shows a run: a bar below, and above it the tables of the part that is under way."""

    def __init__(self, console: Console) -> None:
        self.console, self._growing, self._step = console, Group(), ""
        self._bars = make_bars(console)
        self._task = self._bars.add_task("", total=None)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """The display is up inside; at its end the tables are printed as they stand."""
        self._title, self._rows, self._step = title, list[Row](), ""
        live = Live(
            console=self.console,
            get_renderable=lambda: Group(self._growing, self._bars),
            refresh_per_second=4,
            transient=True,
        )
        with live:
            try:
                yield
            finally:
                for table in results.measured(title, self._rows):
                    print_table(table, self.console)
                self._growing = Group()

    def step(self, what: str, number: int, total: int) -> None:
        self._step = what
        self._bars.update(self._task, description=what, completed=number, total=total)

    def doing(self, what: str) -> None:
        self._bars.update(self._task, description=f"{self._step}: {what}" if self._step else what)

    def done(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        self._growing = Group(*map(shown, results.measured(self._title, self._rows)))


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    """After the tables: what they mean, what is missing and why, and the numbers over all workloads."""
    found = summary.lines(rows)
    if found:
        console.print(Text(f"\n{summary.LEGEND}", style="dim"))
    for table in (results.absent(found), results.unmeasured(rows, ("skipped", "failed")), results.bar_table(found)):
        if table.rows:
            print_table(table, console)
    for bar in summary.bars(found):
        console.print(summary.bar_text(bar), soft_wrap=True)
    for sentence in summary.wrong(found):
        console.print(sentence, style="bold red", soft_wrap=True)


def print_comparison(console: Console, found: compare.Comparison) -> None:
    for note in found.notes:
        console.print(note, style="yellow", soft_wrap=True)
    styles = {"faster": "green", "less": "green", "slower": "red", "more": "red"}
    rows = map(compare.cells, found.changes)
    table = Table.of(compare.HEADER, rows, "B over A", style=lambda row: styles.get(row[-1], "dim"))
    print_table(table, console)
    for text in (*found.summary(), compare.LEGEND):
        console.print(text, soft_wrap=True)
