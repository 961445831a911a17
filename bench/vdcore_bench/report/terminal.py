"""What a terminal shows: tables, and progress. The extra ``bench`` has the packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from vdcore_bench.report.table import Table

WIDTH_OF_FILES = 220  # columns, where the output is not a terminal


def make_console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=WIDTH_OF_FILES)


def shown(table: Table) -> RenderableType:
    """The table below its title; its note is printed by :func:`print_table` alone."""
    made = RichTable(header_style="dim", box=box.SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(table.header):
        made.add_column(name, justify="left" if table.text or i == 0 else "right", overflow="fold")
    for row in table.rows:
        style = table.style(row)
        made.add_row(*(Text(cell, style=style) for cell in row))
    return Group(Text(f"\n{table.title}\n", style="bold"), made) if table.title else made


def print_table(table: Table, console: Console | None = None) -> None:
    console = console or make_console()
    console.print(shown(table))
    if table.note:
        console.print(Text(table.note, style="dim"))


def make_bars(console: Console, disable: bool = False) -> Progress:
    """Bars: description, part done, steps, time."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=disable)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal; where there is none they are disabled, and the caller prints a line now and then."""
    console = Console(stderr=True, highlight=False, markup=False)
    with make_bars(console, disable=not console.is_terminal) as bars:
        yield bars
