"""Plots in one style: colors, a figure without a window, and a PNG of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from vdcore.extras import need

OURS, BEST, THIRD, NAIVE, COPY = "#1f6fb2", "#d9822b", "#3a9d5d", "#8a8a8a", "#444444"


def new_plot(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches and its axes ``[row][column]``, outside pyplot: no window system is asked for."""
    figure = need("matplotlib.figure", "bench", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def save_plot(figure: Any, path: Path) -> str:
    """Writes a PNG; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path.name
