"""The profile's rows as curves over frames: what its tables and plots are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vdcore.bench.machine import bytes_text, seconds_text
from vdcore.bench.results import Row

PROFILE = "profile: "  # how a profile row's case begins
MASKS = "masks: "  # how a row of the mask sweep begins


@dataclass
class Curve:
    """One attention in one pattern; rows by frames. A row that was neither measured nor predicted has no p50."""

    name: str
    memory: dict[float, Row] = field(default_factory=dict)
    time: dict[float, Row] = field(default_factory=dict)

    def cell(self, frames: float) -> str:
        """``"1.5 GiB, 22 ms"``; with ``~`` where it is predicted."""
        memory, time = self.memory.get(frames), self.time.get(frames)
        parts = []
        for row, text in ((memory, bytes_text), (time, seconds_text)):
            if row is None:
                continue
            if row.p50 is None:
                parts.append(row.status)
            else:
                parts.append(("~" if row.status == "predicted" else "") + text(row.p50))
        return ", ".join(dict.fromkeys(parts))


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
        return f"{self.key}, {self.pattern} ({self.shape})"

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
            s = row.shape
            shape = f"{s['S']} tokens a frame, {s['H']} x {s['D']} channels"
            found[key] = Grid(f"{row.workload}, {row.mode}, {row.dtype}, {row.device}", pattern, shape)
        name = f"{row.provider}, {row.variant}" if row.variant else row.provider
        curve = found[key].curves.setdefault(name, Curve(name))
        (curve.memory if row.metric == "memory" else curve.time)[row.x] = row
    return list(found.values())


LEGEND = "Peak memory beyond the inputs, and time of a call; ~: predicted, for the limits of memory and time."
