"""The profile's rows as curves over frames: what its tables and plots are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vdcore_bench.measure.journal import PROFILE, Row
from vdcore_bench.measure.machine import bytes_text, seconds_text


def value_text(row: Row | None, text: Callable[[float], str]) -> str:
    """The number, or why there is none; with ``~`` where it is predicted."""
    if row is None or row.p50 is None:
        return "-" if row is None else row.status
    return ("~" if row.status == "predicted" else "") + text(row.p50)


def _ratio(a: Row | None, b: Row | None) -> str:
    if a is None or b is None or not a.p50 or not b.p50:
        return "-"
    return ("~" if "predicted" in (a.status, b.status) else "") + f"{a.p50 / b.p50:.2f}x"


@dataclass
class Curve:
    """One attention in one pattern; rows by frames. A row that was neither measured nor predicted has no p50."""

    name: str
    memory: dict[float, Row] = field(default_factory=dict)
    time: dict[float, Row] = field(default_factory=dict)

    def cell(self, frames: float) -> str:
        """``"1.5 GiB, 22 ms"``; with ``~`` where it is predicted."""
        rows = ((self.memory.get(frames), bytes_text), (self.time.get(frames), seconds_text))
        return ", ".join(dict.fromkeys(value_text(row, text) for row, text in rows if row is not None))

    def add(self, row: Row) -> None:
        assert row.x is not None
        (self.memory if row.metric == "memory" else self.time)[row.x] = row


@dataclass
class Grid:
    """Curves that belong into one picture: a workload and a pattern.

    Args:
        key: the same for all patterns of a workload, mode, dtype and device.
    """

    key: str
    pattern: str
    shape: str
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.key}, {self.pattern}" + (f" ({self.shape})" if self.shape else "")

    @property
    def frames(self) -> list[float]:
        return sorted({x for curve in self.curves.values() for x in (*curve.memory, *curve.time)})

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.curves)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return [(f"{x:g}", *(curve.cell(x) for curve in self.curves.values())) for x in self.frames]


def is_profile(row: Row) -> bool:
    return row.case.startswith(PROFILE)


def grids(rows: Sequence[Row]) -> list[Grid]:
    """In the order of measurement."""
    found: dict[tuple[str, ...], Grid] = {}
    for row in rows:
        if not is_profile(row) or row.x is None:
            continue
        pattern = row.case.removeprefix(PROFILE)
        key = (row.workload, pattern, row.mode, row.dtype, row.device)
        if key not in found:
            s, title = row.shape, f"{row.workload}, {row.mode}, {row.dtype}, {row.device}"
            shape = f"{s['S']} tokens per frame, {s['H']} x {s['D']} channels" if "S" in s else ""
            found[key] = Grid(title, pattern, shape)
        name = f"{row.provider}, {row.variant}" if row.variant else row.provider
        curve = found[key].curves.setdefault(name, Curve(name))
        curve.add(row)
    return list(found.values())


LEGEND = "Peak memory beyond the inputs, and time of a call; ~: predicted, for the limits of memory and time."


# ---- Whole models, whose curves share a table ----

MODELS = ("vdit", "block")  # op of rows that profile a model or a block of one
MODEL_HEADER: tuple[str, ...] = ("model", "mode", "dtype", "frames", "vdcore")
MODEL_HEADER += ("other", "its memory", "its time", "over vdcore: memory", "time")


def is_model(row: Row) -> bool:
    return is_profile(row) and row.op in MODELS


def model_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Table rows as :data:`MODEL_HEADER` names them: vdcore at every number of frames beside every other provider."""
    found: dict[tuple[str, ...], dict[str, Curve]] = {}
    for row in rows:
        if is_model(row) and row.x is not None:
            curves = found.setdefault((row.workload, row.mode, row.dtype, row.device), {})
            curve = curves.setdefault(row.provider, Curve(row.provider))
            curve.add(row)
    lines: list[tuple[str, ...]] = []
    for (model, mode, dtype, _), curves in found.items():
        ours = curves.pop("vdcore", Curve("vdcore"))
        for frames in sorted(ours.memory):
            for name, theirs in curves.items():
                memory, time = theirs.memory.get(frames), theirs.time.get(frames)
                cells = value_text(memory, bytes_text), value_text(time, seconds_text)
                ratios = _ratio(memory, ours.memory.get(frames)), _ratio(time, ours.time.get(frames))
                lines.append((model, mode, dtype, f"{frames:g}", ours.cell(frames), name, *cells, *ratios))
    return lines
