"""One table, wherever it is shown: in a terminal (:mod:`.console`), in a page, in Markdown, or as plain text."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Markup(str):
    """Text that is HTML already, and is not escaped."""

    __slots__ = ()


def escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def cell(value: Any) -> str:
    """A value as tables show it: three digits of a float, ``-`` for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


@dataclass(frozen=True)
class Table:
    """Cells under a header.

    Args:
        title: stands above it; empty: nothing does.
        note: what the columns mean, in sentences.
        text: all columns are words, which are aligned to the left; else all but the first are numbers.
        style: of a row in a terminal, such as ``"green"``.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""
    text: bool = False
    style: Callable[[tuple[str, ...]], str] = lambda row: ""

    @staticmethod
    def of(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", **options: Any) -> Table:
        """The table of these values, each as :func:`cell` shows it."""
        made = tuple(tuple(v if isinstance(v, str) else cell(v) for v in row) for row in rows)
        return Table(tuple(header), made, title, **options)

    def html(self) -> str:
        """A ``<table>``, without title and note."""
        head = "".join(f"<th>{escaped(name)}</th>" for name in self.header)
        body = "".join("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in row) + "</tr>\n" for row in self.rows)
        kind = ' class="text"' if self.text else ""
        return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'

    def markdown(self) -> str:
        """A pipe table, without title and note."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        ruler = ["---"] + ["---" if self.text else "---:"] * (len(self.header) - 1)
        return "\n".join([line(self.header), line(ruler), *map(line, self.rows)]) + "\n"

    def plain(self) -> str:
        """The title and aligned columns; needs no package."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, tuple("-" * width for width in widths))
        aligned = ("  ".join(c.ljust(width) for c, width in zip(line, widths)).rstrip() for line in lines)
        return "\n".join([self.title, "", *aligned, ""])
