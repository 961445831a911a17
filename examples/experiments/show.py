"""What experiments share: progress on the terminal, plots, and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vdcore.cli.terminal import progress as bars
from vdcore.extras import need

ON, OFF, THIRD, GRAY = "#1f6fb2", "#d9822b", "#3a9d5d", "#8a8a8a"

Track = Callable[[str, int], Iterable[int]]  # a description and a number of steps, as a range that shows its progress


@contextmanager
def progress(title: str) -> Iterator[Track]:
    """A bar for every stage of an experiment, while it runs::

    with progress("horizon") as track:
        for step in track("training", 100): ...
    """
    with bars() as bar:

        def track(description: str, steps: int) -> Iterator[int]:
            if bar.disable:
                bar.console.print(f"{title}: {description}")
            yield from bar.track(range(steps), description=f"{title}: {description}")

        yield track


def new_plot(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes ``[row][column]``, outside pyplot: no window system is asked for."""
    figure = need("matplotlib.figure", "bench", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curves(
    axis: Any,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    colors: Sequence[str] = (ON, OFF, THIRD),
    *,
    marker: str = "",
    **settings: Any,
) -> None:
    """Curves by label over one x, with their legend; ``settings`` are matplotlib's of the axis."""
    for (label, y), color in zip(curves.items(), colors):
        axis.plot(x, y, color=color, label=label, marker=marker, markersize=4)
    axis.set(**settings)
    axis.legend(fontsize=8)


def save_plot(figure: Any, path: Path) -> str:
    """Writes a PNG; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    return path.name


def save_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], text: str = "") -> str:
    """Writes a Markdown table below its explanation, and prints it; returns the file's name."""
    cells = [[_cell(value) for value in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(f"{text}\n\n{body}\n" if text else body + "\n")
    rich = need("rich.table", "bench", "table")
    shown = rich.Table(header_style="dim", box=need("rich.box", "bench", "table").SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left")
    for row in cells:
        shown.add_row(*row)
    need("rich.console", "bench", "table").Console(highlight=False, markup=False).print(shown)
    return path.name


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
