"""What experiments show while they run, and how they draw: bars of progress, and curves in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vdcore_bench.report.plot import BEST, NAIVE, OURS, THIRD, new_plot, save_plot
from vdcore_bench.report.terminal import progress as bars

__all__ = ["GRAY", "OFF", "ON", "THIRD", "Track", "draw_curves", "new_plot", "progress", "save_plot"]

ON, OFF, GRAY = OURS, BEST, NAIVE

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
