"""What masks would cost a model's picture: :func:`vdcore.integrations.masks.measure_masks` as rows, tables, pictures.

A row is a number of one mask in one head of one layer; its ``shape`` says which, and the grid.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from vdcore.integrations.masks import DENSE, MaskReport, measure_masks
from vdcore_bench.measure.journal import Journal, Row, Watch, row_here
from vdcore_bench.report.plot import BEST, COPY, OURS, new_plot, png

OP = "measure_masks"
MASS, WORST, ERROR, DENSITY, TIME, CHOICE = "mass", "worst mass", "output error", "density", "time", "choice"
KEEP = 0.95


@dataclass(frozen=True)
class Settings:
    """As :func:`measure_masks` has them.

    Args:
        keep: share of the softmax that a recommended mask keeps.
    """

    masks: Sequence[str] | None = None
    calls: tuple[int, ...] = (0,)
    query_frames: int | None = None
    rounds: int = 3
    keep: float = KEEP


def run(
    name: str,
    model: Any,
    call: Mapping[str, Any] | Callable[[], Any],
    settings: Settings,
    journal: Journal,
    watch: Watch,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MaskReport:
    """Measures the masks of one model; its rows go to the journal."""
    with watch.part("How much of a model's attention masks keep"):
        number = 0

        def on_layer(layer: str) -> None:
            nonlocal number
            watch.step(f"{name}, {layer}", number, number + 1)
            number += 1

        report = measure_masks(
            model,
            call,
            settings.masks,
            calls=settings.calls,
            query_frames=settings.query_frames,
            rounds=settings.rounds,
            on_layer=on_layer,
        )
        begin = len(journal.rows)
        journal.add(rows_of(name, report, settings, device, dtype))
        watch.done(journal.rows[begin:])
    return report


def rows_of(name: str, report: MaskReport, settings: Settings, device: str, dtype: torch.dtype) -> list[Row]:
    """A report as rows: shares of 1 for mass and density, and the choice as a row whose reason is the mask."""
    T, rows, columns = report.grid
    frames = len(report.query_frames)
    part = "" if frames == T else f"of the queries of {frames} frames"

    def row(metric: str, mask: str, value: float | None, layer: str = "", **rest: Any) -> Row:
        places: dict[str, int] = {key: rest.pop(key) for key in ("head", "call") if key in rest}
        if layer:
            places["layer"] = report.layers.index(layer)
        shape = {"T": T, "S": rows * columns, "rows": rows, "columns": columns, **places}
        about: dict[str, Any] = {"op": OP, "workload": name, "mode": "fwd", "case": mask, "metric": metric, "unit": "1"}
        about |= {"provider": "vdcore", "variant": layer, "x": float(T), "p50": value, "samples": 1}
        return row_here(device, dtype, **{**about, "shape": shape, "original": shape, "reason": part, **rest})

    found = [row(DENSITY, mask, report.of(mask)[0].density) for mask in report.masks]
    for kept in report.kept:
        for metric, value in ((MASS, kept.mass), (WORST, kept.worst), (ERROR, kept.error)):
            found.append(row(metric, kept.mask, value, kept.layer, head=kept.head, call=kept.call))
    for (layer, mask), seconds in report.seconds.items():
        found.append(row(TIME, mask, seconds, layer, unit="s", samples=settings.rounds))
    for layer, names in report.choices(settings.keep).items():
        for head, mask in enumerate(names):
            cost = report.cost(mask)
            found.append(row(CHOICE, f"keep {settings.keep:g}", cost, layer, head=head, reason=mask))
    return found


# ---- Tables ----

HEADER: tuple[str, ...] = ("mask", "density", "time / dense", "kept", "least head", "worst 1 %", "error", "heads")
LEGEND = (
    "Kept: the share of a query's softmax that the mask keeps, the mean over queries, heads and layers; least head: of "
    "the head that keeps least; worst 1 %: all but a hundredth of its queries keep more. Error: the norm of the change "
    "of a head's output over the norm of that output, before the last projection. Heads: those that keep enough."
)


@dataclass(frozen=True)
class Model:
    """The rows of one model."""

    name: str
    rows: list[Row]

    def of(self, metric: str) -> list[Row]:
        return [row for row in self.rows if row.metric == metric]

    @property
    def masks(self) -> list[str]:
        """The cheapest first."""
        return sorted((row.case for row in self.of(DENSITY)), key=self.cost)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.of(MASS)))

    @property
    def keep(self) -> float:
        return float(self.of(CHOICE)[0].case.removeprefix("keep "))

    def density(self, mask: str) -> float:
        return next(row.p50 or 0.0 for row in self.of(DENSITY) if row.case == mask)

    def cost(self, mask: str) -> float:
        """Time over dense, or the density where nothing was timed."""
        time = Counter[str]()
        for row in self.of(TIME):
            time[row.case] += row.p50 or 0.0  # type: ignore[assignment]
        if mask == DENSE:
            return 1.0
        return time[mask] / time[DENSE] if time else self.density(mask)

    def values(self, metric: str, mask: str) -> list[float]:
        return [row.p50 or 0.0 for row in self.of(metric) if row.case == mask]

    def heads(self, metric: str, mask: str, worst: Callable[[Iterable[float]], float]) -> dict[tuple[str, int], float]:
        """By layer and head, the worst of all calls."""
        found: dict[tuple[str, int], list[float]] = {}
        for row in self.of(metric):
            if row.case == mask:
                found.setdefault((row.variant, row.shape["head"]), []).append(row.p50 or 0.0)
        return {place: worst(values) for place, values in found.items()}

    def choices(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for row in self.of(CHOICE):
            found.setdefault(row.variant, []).append(row.reason)
        return found

    @property
    def title(self) -> str:
        s = self.rows[0].shape
        part = self.of(MASS)[0].reason
        return f"{self.name}: {s['T']} frames of {s['rows']} x {s['columns']} tokens{', ' if part else ''}{part}"


def models(rows: Sequence[Row]) -> list[Model]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.op == OP:
            found.setdefault(row.workload, []).append(row)
    return [Model(name, of) for name, of in found.items()]


def cells(model: Model) -> list[tuple[Any, ...]]:
    """Table rows as :data:`HEADER` names them."""
    lines = []
    for mask in model.masks:
        least = model.heads(MASS, mask, min)
        enough = sum(mass >= model.keep for mass in least.values())
        mean, error = (statistics.fmean(model.values(metric, mask)) for metric in (MASS, ERROR))
        numbers = f"{mean:.3f}", f"{min(least.values()):.3f}", f"{min(model.values(WORST, mask)):.3f}", f"{error:.3f}"
        time = f"{model.cost(mask):.2f}" if model.of(TIME) else "-"
        lines.append((mask, f"{model.density(mask):.1%}", time, *numbers, f"{enough} of {len(least)}"))
    return lines


CHOICE_HEADER: tuple[str, ...] = ("layer", "the cheapest mask of every head that keeps enough", "time / dense")


def choice_cells(model: Model) -> list[tuple[Any, ...]]:
    """A line a layer: runs of heads with one mask."""
    lines: list[tuple[Any, ...]] = []
    for layer, names in model.choices().items():
        runs = ((len(list(run)), name) for name, run in groupby(names))
        lines.append((layer, ", ".join(f"{n} x {name}" for n, name in runs), _mean_cost(model, names)))
    every = [name for names in model.choices().values() for name in names]
    counts = ", ".join(f"{n} x {name}" for name, n in Counter(every).most_common())
    return [*lines, ("all", counts, _mean_cost(model, every))]


def _mean_cost(model: Model, names: Sequence[str]) -> str:
    return f"{statistics.fmean(model.cost(name) for name in names):.2f}"


def head_cells(model: Model) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every head: the mass that each mask keeps, what all but a hundredth keep, and the error."""
    columns = []
    for mask in model.masks:
        numbers = [model.heads(m, mask, worst) for m, worst in ((MASS, min), (WORST, min), (ERROR, max))]
        columns.append({place: " / ".join(f"{of[place]:.3f}" for of in numbers) for place in numbers[0]})
    places = list(columns[0])
    return ("layer", "head", *model.masks), [(p[0], str(p[1]), *(c[p] for c in columns)) for p in places]


# ---- Pictures ----


def picture(model: Model) -> bytes:
    """Mass kept by layer and head, a panel a mask; below it against the cost of the mask."""
    masks, places = model.masks, list(model.heads(MASS, model.masks[0], min))
    heads = 1 + max(head for _, head in places)
    columns = min(len(masks), 5)
    rows = -(-len(masks) // columns)
    figure, axes = new_plot(2.6 * columns + 1, 2.3 * rows + 3.4, columns=columns, rows=rows + 1)
    shown = None
    for i, mask in enumerate(masks):
        axis, mass = axes[i // columns][i % columns], model.heads(MASS, mask, min)
        table = [[mass.get((layer, head), float("nan")) for head in range(heads)] for layer in model.layers]
        shown = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(f"{mask}\n{model.density(mask):.1%} of pairs", fontsize=8)
        axis.set_xticks(range(heads))
        axis.set_yticks(range(len(model.layers)))
        axis.set_xlabel("head", fontsize=7)
        axis.set_ylabel("layer", fontsize=7)
        axis.tick_params(labelsize=7)
    for axis in [axes[i // columns][i % columns] for i in range(len(masks), rows * columns)]:
        axis.axis("off")
    figure.colorbar(shown, ax=[axis for line in axes[:rows] for axis in line], label="share of the softmax kept")
    grid = axes[rows][0].get_gridspec()
    for axis in axes[rows]:
        axis.remove()
    half = (columns + 1) // 2 if model.of(TIME) and columns > 1 else columns
    _against(figure.add_subplot(grid[rows, :half]), model, "visible pairs over all", model.density)
    if half < columns:
        _against(figure.add_subplot(grid[rows, half:]), model, "time of attention over dense", model.cost)
    figure.suptitle(model.title, fontsize=10)
    return png(figure)


def _against(axis: Any, model: Model, what: str, cost: Callable[[str], float]) -> None:
    """Mass kept against what a mask costs: every head, and their mean."""
    for mask in model.masks:
        x, mass = cost(mask), list(model.heads(MASS, mask, min).values())
        axis.plot([x] * len(mass), mass, linestyle="", marker=".", color=OURS, alpha=0.35)
        axis.plot(x, statistics.fmean(mass), marker="o", color=BEST)
        axis.annotate(mask, (x, min(mass)), fontsize=6, rotation=40, va="top", ha="right")
    axis.axhline(model.keep, color=COPY, linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.3, 1.03)
    axis.set_xscale("log")
    axis.set_xlabel(what)
    axis.set_ylabel("share kept")
    axis.set_title("every head (blue), their mean (orange)", fontsize=8)
    axis.grid(alpha=0.25)
