"""Two result files beside each other: what changed, and what is noise.

The peers' rows are the control: code of ours does not move them, so what they moved is the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vdcore_bench.measure.journal import Row
from vdcore_bench.measure.machine import bytes_text, seconds_text
from vdcore_bench.measure.timing import Spread
from vdcore_bench.report import summary


@dataclass(frozen=True)
class Change:
    """The same measurement in A and in B; ``verdict``: noise, faster, slower, less, more, or the statuses."""

    a: Row
    b: Row
    verdict: str

    @property
    def ratio(self) -> float | None:
        """B over A; None unless both have a number."""
        return self.b.p50 / self.a.p50 if self.a.p50 and self.b.p50 else None


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        drift: what four in five of the peers' rows moved by at most, as a factor above 1; 1 without peers.
        only_a, only_b: rows without a counterpart.
        notes: what makes the two hard to compare.
    """

    changes: list[Change]
    drift: float
    only_a: list[Row]
    only_b: list[Row]
    notes: list[str]

    def summary(self) -> list[str]:
        """Sentences: counts, and the geometric mean over vdcore's rows."""
        ours = [c for c in self.changes if _is_ours(c.b)]
        ratios = [c.ratio for c in ours if c.ratio is not None and c.b.metric == "time"]
        counts: dict[str, int] = {}
        for change in ours:
            counts[change.verdict] = counts.get(change.verdict, 0) + 1
        said = [f"vdcore's {len(ours)} rows: " + (", ".join(f"{n} {v}" for v, n in counts.items()) or "none")]
        if ratios:
            said.append(f"vdcore's times, B over A, geometric mean of {len(ratios)}: {summary.geomean(ratios):.3f}")
        if self.drift > 1:
            said.append(f"drift of the machine: four in five of the peers' rows moved by {self.drift - 1:.1%} or less")
        if self.only_a or self.only_b:
            said.append(f"without a counterpart: {len(self.only_a)} rows of A, {len(self.only_b)} rows of B")
        return said


def _is_ours(row: Row) -> bool:
    return row.provider.startswith("vdcore")


def compare(a: Sequence[Row], b: Sequence[Row]) -> Comparison:
    """Pairs the rows by :meth:`Row.key`; of several rows with one key the last counts."""
    before, after = ({row.key(): row for row in rows} for rows in (a, b))
    pairs = [(before[key], after[key]) for key in before if key in after]
    moved = [
        abs(math.log(y.p50 / x.p50))
        for x, y in pairs
        if not _is_ours(x) and x.metric == "time" and x.status == y.status == "ok" and x.p50 and y.p50
    ]
    drift = math.exp(Spread.of(moved).p80) if moved else 1.0
    return Comparison(
        [Change(x, y, _verdict(x, y, drift)) for x, y in pairs],
        drift,
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
        _notes(a, b),
    )


def _verdict(a: Row, b: Row, drift: float) -> str:
    if a.status != b.status:
        return f"{a.status} -> {b.status}"
    if a.status != "ok" or not a.p50 or not b.p50:
        return a.status
    within = 1 / drift <= b.p50 / a.p50 <= drift
    if summary.overlap(a, b) or within:
        return "noise"
    names = ("less", "more") if a.metric == "memory" else ("faster", "slower")
    return names[b.p50 > a.p50]


def _notes(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """Where the two ran on different things, vdcore and its commit left out."""
    notes = []
    for name in ("cpu", "isa", "gpu", "torch", "triton", "python"):
        seen = [sorted({str(row.versions.get(name)) for row in rows}) for rows in (a, b)]
        if seen[0] != seen[1]:
            notes.append(f"{name} differs: A has {', '.join(seen[0])}; B has {', '.join(seen[1])}")
    return notes


HEADER = ("measurement", "provider", "A", "B", "B / A", "verdict")
LEGEND = (
    "noise: the intervals p20..p80 overlap, or the medians differ by no more than the drift of the peers' rows, which "
    "no change of ours can move. Intervals are of one run; two runs of the same code on a busy machine differ by more."
)


def cells(change: Change) -> tuple[str, ...]:
    """One table row, as :data:`HEADER` names it."""
    a, b = change.a, change.b
    text = bytes_text if b.unit == "bytes" else seconds_text
    case = "" if b.case == "plain" else f", {b.case}"
    what = f"{b.op}{case}, {b.workload}, {b.dtype}, {b.mode}" + (f", {b.metric}" if b.metric != "time" else "")
    if b.metric != "overhead" and b.case.startswith("profile"):
        what += f", {b.x:g} frames"

    def value(row: Row) -> str:
        if row.p50 is None:
            return row.status
        if row.p20 is None or row.p80 is None or row.samples < 2:
            return text(row.p50)
        return f"{text(row.p50)} ({text(row.p20)}..{text(row.p80)})"

    ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
    return what, summary.name_of(b), value(a), value(b), ratio, change.verdict
