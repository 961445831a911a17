"""The pictures: times of every job as bars, and the profile as curves over frames, predictions hollow and dashed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vdcore_bench.measure.journal import Row
from vdcore_bench.report import curves, summary
from vdcore_bench.report.plot import BEST, COPY, NAIVE, OURS, new_plot, png
from vdcore_bench.suites import grid_masks, kept, masks
from vdcore_bench.suites.models import step_tables

COLORS = {"vdcore": OURS, "sdpa": BEST, "naive": NAIVE}
Pictures = dict[str, tuple[str, bytes]]  # file stem -> title, PNG


def draw(rows: Sequence[Row]) -> Pictures:
    """All pictures that the rows allow."""
    found = summary.lines(rows)
    pictures: Pictures = {}
    temporal = [line for line in found if line.job.op == "temporal_attention"]
    others = [line for line in found if line.job.op != "temporal_attention"]
    for name, title, some in (
        ("temporal_attention", "Temporal attention", temporal),
        ("operators", "The other operators", others),
    ):
        drawable = [line for line in some if line.ours is not None]
        if drawable:
            pictures[name] = (title, _bars(title, drawable))
    if races := grid_masks.races(rows):
        pictures["masks"] = ("Speed-up against density", grid_masks.picture(races))
    if parts := step_tables.picture(rows):
        pictures["steps"] = ("What the time of a step goes to", parts)
    if lengths := masks.picture(rows):
        pictures["lengths"] = ("Time against frames under masks", lengths)
    for i, model in enumerate(kept.models(rows)):
        pictures["kept" + (f"_{i + 1}" if i else "")] = (f"What masks keep: {model.title}", kept.picture(model))
    points = [row for row in rows if row.p50 is not None]
    for i, group in enumerate(_by_workload(curves.grids(points))):
        title = f"Memory and time against frames: {group[0].key}"
        pictures["profile" + (f"_{i + 1}" if i else "")] = (title, _profile(title, group))
    return pictures


# ---- Bars: vdcore, the best peer, naive and the copy of every job ----


def _label(line: summary.Line) -> str:
    job = line.job
    op = "" if job.op == "temporal_attention" else f"{job.op} "
    return f"{op}{job.workload}\n{job.dtype}, {job.mode}{summary.case_of(line)}"


def _bars(title: str, found: Sequence[summary.Line]) -> bytes:
    figure, axes = new_plot(10.5, 1.6 + 0.52 * len(found))
    axis = axes[0][0]
    for y, line in enumerate(found):
        ours, best, naive, copy = line.ours, line.best, line.naive, line.copy
        for row, color, at, height in ((best, BEST, y + 0.2, 0.36), (ours, OURS, y - 0.2, 0.36)):
            if row is not None and row.p50:
                axis.barh(at, row.p50 * 1e3, height=height, color=color)
                low, high = (row.p20 or row.p50) * 1e3, (row.p80 or row.p50) * 1e3
                axis.plot([low, high], [at, at], color="black", linewidth=1)
        for row, marker, color in ((naive, "o", NAIVE), (copy, "|", COPY)):
            if row is not None and row.p50:
                axis.plot(row.p50 * 1e3, y, marker=marker, color=color, markersize=6 if marker == "o" else 20)
        if line.speedup is not None:
            text = f"{line.speedup:.2f}x" + (" ~" if line.noise else "")
            axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.set_xscale("log")
    axis.set_yticks(range(len(found)), [_label(line) for line in found], fontsize=7.5)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set_xlabel("milliseconds per call, median; black: p20 to p80. Right: fastest peer over vdcore; ~: noise")
    axis.set_title(f"{title}: vdcore beside the fastest peer", loc="left", fontsize=11)
    axis.grid(axis="x", which="both", alpha=0.2)
    axis.set_axisbelow(True)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=OURS, label="vdcore"),
        Patch(color=BEST, label="fastest peer"),
        Line2D([], [], color=NAIVE, marker="o", linestyle="", label="naive"),
        Line2D([], [], color=COPY, marker="|", markersize=12, linestyle="", label="copy of the same bytes"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return png(figure)


# ---- The profile ----


def _by_workload(grids: Sequence[curves.Grid]) -> list[list[curves.Grid]]:
    found: dict[str, list[curves.Grid]] = {}
    for grid in grids:
        found.setdefault(grid.key, []).append(grid)
    return list(found.values())


def _style(name: str) -> dict[str, Any]:
    provider = name.partition(",")[0]
    marker = {"vdcore": "o", "sdpa": "s", "naive": "^"}.get(provider, "D")
    return {"color": COLORS.get(provider, "black"), "marker": "v" if "mask" in name else marker}


def _profile(title: str, grids: Sequence[curves.Grid]) -> bytes:
    figure, axes = new_plot(4.4 * len(grids), 7.6, columns=len(grids), rows=2)
    for column, grid in enumerate(grids):
        for axis, metric, scale, unit in (
            (axes[0][column], "memory", 2.0**20, "peak MiB beyond the inputs"),
            (axes[1][column], "time", 1.0, "seconds per call"),
        ):
            for name, curve in grid.curves.items():
                _curve(axis, name, getattr(curve, metric), scale)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(grid.frames, [f"{x:g}" for x in grid.frames])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.set_ylabel(unit if column == 0 else "")
        axes[0][column].set_title(f"{grid.pattern}\n{grid.shape}", fontsize=9)
        axes[1][column].set_xlabel("frames")
        axes[0][column].legend(fontsize=7.5, framealpha=0.8)
    figure.suptitle(f"{title} (hollow, dashed: predicted, would not fit the limits)", fontsize=11)
    return png(figure)


def _curve(axis: Any, name: str, points: dict[float, Row], scale: float) -> None:
    """Measured points filled and joined; the line to and between predicted points is dashed."""
    known = [(x, row) for x, row in sorted(points.items()) if row.p50]
    style = _style(name)
    measured = [(x, row.p50 / scale) for x, row in known if row.status == "ok" and row.p50]
    predicted = [(x, row.p50 / scale) for x, row in known if row.status == "predicted" and row.p50]
    if measured:
        axis.plot(*zip(*measured), label=name, markersize=5, **style)
    if predicted:
        tail = ([measured[-1]] if measured else []) + predicted
        axis.plot(*zip(*tail), linestyle=(0, (4, 3)), linewidth=1, color=style["color"])
        label = "" if measured else name
        axis.plot(*zip(*predicted), linestyle="", markerfacecolor="white", markersize=5, label=label, **style)
