"""The sentences on top of a report: what won, what lost and by how much, computed from its rows, suite by suite."""

from __future__ import annotations

from collections.abc import Sequence

from vdcore_bench.measure.journal import Row
from vdcore_bench.report import curves, summary
from vdcore_bench.suites import grid_masks, kept, masks
from vdcore_bench.suites.models import given, step_tables

MASKED = 0.999  # visible shares below it are a mask's


def sentences(rows: Sequence[Row]) -> list[list[str]]:
    """Paragraphs, one a suite that has rows, of three sentences at most."""
    found = (
        summary.sentences(summary.lines(rows)),
        step_tables.sentences(rows),
        _of_profiles(rows),
        _of_masks(rows),
        _of_kept(rows),
    )
    return [part for part in found if part]


def _of_profiles(rows: Sequence[Row]) -> list[str]:
    """What others take over vdcore, at the most frames that both were measured at; what was not run; what fits."""
    said = []
    for metric, what in (("memory", "peak memory"), ("time", "time")):
        ratios: dict[str, float] = {}
        for grid in curves.grids(rows):
            ours = grid.curves.get("vdcore")
            others = {name: curve for name, curve in grid.curves.items() if ours and not name.startswith("vdcore")}
            for name, curve in others.items():
                theirs, mine = getattr(curve, metric), getattr(ours, metric)
                both = [
                    x for x in theirs if x in mine and all(r.status == "ok" and r.p50 for r in (theirs[x], mine[x]))
                ]
                if both:
                    where = f"{name}, {grid.pattern}" if grid.pattern != given.OP else name
                    ratios[f"{where}, {max(both):g} frames"] = theirs[max(both)].p50 / mine[max(both)].p50
        if ratios:
            most = summary.between(ratios, "{:.3g}")
            said.append(f"At the most frames that both were measured at, the others' {what} over vdcore's is {most}.")
    if said:
        points = [row for row in rows if curves.is_profile(row)]
        predicted = sum(row.status == "predicted" for row in points)
        failed = sum(row.status == "failed" for row in points)
        said.append(f"Of {len(points)} numbers {predicted} are predicted, as they would not fit, and {failed} failed.")
    return said


def _measured(row: Row) -> bool:
    return row.status == "ok" and bool(row.p50)


def _of_masks(rows: Sequence[Row]) -> list[str]:
    """A visible pair's time over dense attention's, and the speed-up over the best peer."""
    over: dict[str, float] = {}
    faster: dict[str, float] = {}
    for group in masks.tables(rows).values():
        for name, frames, visible, _, _, ratio, _, speedup, _ in group:
            if ratio != "-" and "FlexAttention" not in name and float(visible.rstrip("%")) < 100 * MASKED:
                over[f"{name}, {frames} frames"] = float(ratio)
            if speedup != "-" and float(visible.rstrip("%")) < 100 * MASKED:
                faster[f"{name}, {frames} frames"] = float(speedup.rstrip("x"))
    for race in grid_masks.races(rows):
        for text, visible, provider, _, _, ratio, speedup, _ in grid_masks.cells(race):
            name, dense = text.partition(" (")[0], float(visible.rstrip("%")) >= 100 * MASKED
            if provider == "vdcore" and ratio != "-" and not dense:
                over[name] = float(ratio)
            if speedup != "-" and not dense:
                faster[f"{name}, {provider}"] = float(speedup.rstrip("x"))
    said = []
    if over:
        text = summary.between(over, "{:.2f}")
        said.append(f"Under masks a visible pair takes vdcore {text} times as long as without.")
    if faster:
        said.append(f"Under them the others take {summary.between(faster, '{:.1f}')} times as long as vdcore.")
    return said


def _of_kept(rows: Sequence[Row]) -> list[str]:
    """Which masks a model's heads bear."""
    said = []
    for model in kept.models(rows):
        names = [name for layer in model.choices().values() for name in layer]
        dense = sum(name == kept.DENSE for name in names)
        cost = sum(model.cost(name) for name in names) / len(names)
        said.append(
            f"{model.name}: {len(names) - dense} of {len(names)} heads are recommended a mask, the cheapest that keeps"
            f" {model.keep:.0%} of their softmax; attention takes {cost:.2f} of its dense time then."
        )
    return said
