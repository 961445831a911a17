"""Rows as one line per job: vdcore beside the best peer. Tables, report and README are made of these."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vdcore_bench.jobs import JOBS
from vdcore_bench.measure.journal import GRID_MASKS, JOINED, MASKS, PROFILE, Row, newest
from vdcore_bench.measure.machine import Load, seconds_text, seconds_unit

HEADER: tuple[str, ...] = ("workload", "dtype", "mode", "vdcore", "best peer", "speed-up", "naive", "rate")
HEADER += ("floors: copy, products", "time / floor", "error")


@dataclass
class Line:
    """The rows of one job.

    Args:
        ours: the backend that vdcore chooses by itself.
        peers: measured rows of the baselines, fastest first.
        others: rows that were not measured, each with its reason.
    """

    job: Row
    ours: Row | None = None
    copy: Row | None = None
    peers: list[Row] = field(default_factory=list)
    backends: list[Row] = field(default_factory=list)
    others: list[Row] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The fastest peer of the race that ours is from."""
        again = self.ours is not None and JOINED in self.ours.reason
        return next((row for row in self.peers if not again or JOINED in row.reason), None)

    @property
    def naive(self) -> Row | None:
        return next((row for row in self.peers if row.provider == "naive"), None)

    @property
    def speedup(self) -> float | None:
        return _ratio(self.best, self.ours)

    @property
    def noise(self) -> bool:
        """Whether the intervals p20 to p80 of vdcore and of the best peer overlap."""
        return self.ours is not None and self.best is not None and overlap(self.ours, self.best)

    @property
    def over_copy(self) -> float | None:
        return _ratio(self.ours, self.copy)

    @property
    def floors(self) -> tuple[float | None, float | None]:
        """Seconds that the call's bytes take, and its products: neither can be gone below by much."""
        return self.copy.p50 if self.copy else None, self.ours.products if self.ours else None

    @property
    def over_floor(self) -> float | None:
        """Our time over the larger floor."""
        known = [seconds for seconds in self.floors if seconds]
        return self.ours.p50 / max(known) if known and self.ours is not None and self.ours.p50 else None


def _ratio(a: Row | None, b: Row | None) -> float | None:
    """The time of a over that of b."""
    return a.p50 / b.p50 if a is not None and b is not None and a.p50 and b.p50 else None


def overlap(a: Row, b: Row) -> bool:
    """Whether the intervals p20 to p80 share a point."""
    if a.p20 is None or a.p80 is None or b.p20 is None or b.p80 is None:
        return True
    return a.p20 <= b.p80 and b.p20 <= a.p80


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line per job of the ``time`` rows, in the order in which they were measured; of two races the later."""
    found: dict[tuple[Any, ...], Line] = {}
    for row in newest(rows):
        elsewhere = row.op not in JOBS or row.case.startswith((PROFILE, MASKS, GRID_MASKS))
        if row.metric not in ("time", "memory") or elsewhere:
            continue
        line = found.setdefault(row.job(), Line(row))
        if row.status != "ok" or row.metric != "time" or row.p50 is None:
            line.others.append(row)
        elif row.provider == "copy":
            if line.copy is None or row.p50 < (line.copy.p50 or 0):
                line.copy = row
        elif not row.provider.startswith("vdcore"):
            line.peers.append(row)
        elif row.variant == "auto":
            line.ours = row
        else:
            line.backends.append(row)
    for line in found.values():
        line.peers.sort(key=lambda row: row.p50 or 0)
    return list(found.values())


def name_of(row: Row) -> str:
    return f"{row.provider} {row.variant}".strip() if row.variant not in ("", "auto", "named") else row.provider


def rate(row: Row) -> str:
    """GB/s of the least traffic where memory is the limit, else TFLOP/s or GFLOP/s of the visible pairs."""
    if not row.p50:
        return ""
    if JOBS[row.op].MEMORY_BOUND and row.bytes:
        return f"{row.bytes / row.p50 / 1e9:.3g} GB/s"
    if not row.flops:
        return ""
    speed = row.flops / row.p50
    return f"{speed / 1e12:.3g} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.3g} GFLOP/s"


def time_of(row: Row | None, spread: bool = False) -> str:
    if row is None or row.p50 is None:
        return "-"
    if not spread or row.p20 is None or row.p80 is None or row.samples < 2:
        return seconds_text(row.p50)
    factor, _ = seconds_unit(row.p50)
    scale = float(f"{row.p50 * factor:.3g}") / row.p50  # the median that is shown, over the one that was measured
    return f"{seconds_text(row.p50)} ({row.p20 * scale:.3g}..{row.p80 * scale:.3g})"


def cells(line: Line) -> tuple[str, ...]:
    """One table row, as :data:`HEADER` names it."""
    ours, best = line.ours, line.best
    return (
        line.job.workload,
        line.job.dtype,
        line.job.mode,
        f"{time_of(ours, spread=True)} {backend_of(ours)}".strip(),
        f"{time_of(best, spread=True)} {name_of(best)}" if best else "-",
        speedup_text(line),
        time_of(line.naive),
        rate(ours) if ours else "-",
        ", ".join(seconds_text(seconds) if seconds else "-" for seconds in line.floors),
        "-" if line.over_floor is None else f"{line.over_floor:.2f}",
        error_text(ours),
    )


def speedup_text(line: Line) -> str:
    """``"1.07x ~"``: the best peer's time over ours; ~ where the difference is noise."""
    return "-" if line.speedup is None else f"{line.speedup:.2f}x" + (" ~" if line.noise else "")


def case_of(line: Line) -> str:
    """What follows the operator's name: ``", norm + rope"``."""
    return "" if line.job.case == "plain" else f", {line.job.case}"


def backend_of(row: Row | None) -> str:
    return "" if row is None else row.provider.removeprefix("vdcore")


def error_text(row: Row | None) -> str:
    if row is None or row.error_ratio is None:
        return "-"
    return f"{row.error_ratio:.2f}" + ("" if row.error_ratio <= 1 else " !")


def groups(found: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines by operator and case, in order: one table each."""
    tables: dict[str, list[Line]] = {}
    for line in found:
        tables.setdefault(line.job.op + case_of(line), []).append(line)
    return tables


def sentences(found: Sequence[Line]) -> list[str]:
    """What won, what lost, by how much, and whether the results are right; empty without a race."""
    races = [line for line in found if line.speedup is not None]
    if not races:
        return []
    lost = sorted((line for line in races if (line.speedup or 0) < 1), key=lambda line: line.speedup or 0)
    won = [line for line in races if (line.speedup or 0) >= 1]
    said = [
        f"vdcore is at least as fast as the best peer in {len(won)} of {len(races)} jobs, by a geometric mean of"
        f" {geomean([line.speedup or 1.0 for line in races]):.2f}x over all of them"
        + (f"; most in {_job_text(max(won, key=lambda line: line.speedup or 0))}." if won else ".")
    ]
    clear = [line for line in lost if not line.noise]
    if not lost:
        said.append("It loses none.")
    else:
        noisy = f", {len(clear) or 'none'} of them by more than noise" if len(clear) < len(lost) else ""
        said.append(f"It loses {len(lost)}{noisy}: worst in {_job_text((clear or lost)[0])}.")
    ratios = [line.ours.error_ratio for line in found if line.ours is not None and line.ours.error_ratio is not None]
    if ratios:
        beyond = sum(not ratio <= 1 for ratio in ratios)
        within = f"all are within the tolerance rule, the largest at {max(ratios):.2f} of what it allows"
        said.append(f"Of {len(ratios)} results, {f'{beyond} are beyond the tolerance rule' if beyond else within}.")
    return said


def _job_text(line: Line) -> str:
    job, best = line.job, name_of(line.best) if line.best else "-"
    return f"{job.op}{case_of(line)}, {job.workload}, {job.dtype}, {job.mode}: {line.speedup:.2f}x of {best}"


def between(found: dict[str, float], form: str) -> str:
    """``"0.9 (a) to 12 (b)"``: the least and the largest, with their names."""
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    text = f"{form.format(found[low])} ({low})"
    return text if low == high else f"{text} to {form.format(found[high])} ({high})"


def absent(found: Sequence[Line]) -> dict[str, list[str]]:
    """Why providers are missing: reason -> providers, each once."""
    reasons: dict[str, list[str]] = {}
    for line in found:
        for row in line.others:
            names = reasons.setdefault(f"{row.reason}" if row.status != "failed" else f"failed: {row.reason}", [])
            name = name_of(row)
            if name not in names:
                names.append(name)
    return reasons


def wrong(found: Sequence[Line]) -> list[str]:
    """A sentence for every row of ours whose error is beyond the tolerance rule, or that failed."""
    said = []
    for line in found:
        job = line.job
        what = f"{job.op}, {job.case}, {job.workload}, {job.mode}, {job.dtype}"
        for row in (line.ours, *line.backends):
            if row is not None and row.error_ratio is not None and not row.error_ratio <= 1:
                said.append(f"{row.provider} is {row.error_ratio:.2f} times as wrong as allowed: {what}")
        said += [f"{r.provider} failed: {what}: {r.reason}" for r in line.others if _failed(r)]
    return said


def _failed(row: Row) -> bool:
    return row.status == "failed" and row.provider.startswith("vdcore")


OVERHEAD_HEADER = ("operator", "mode", "provider", "time of a call", "of it beside the kernel")


def overhead_cells(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Table rows as :data:`OVERHEAD_HEADER` names them."""
    rows = [row for row in rows if row.metric == "overhead" and row.p50]
    kernels = {(row.op, row.mode): row.p50 or 0.0 for row in rows if row.variant == "kernel alone"}
    made: list[tuple[str, ...]] = []
    for row in rows:
        kernel = kernels.get((row.op, row.mode))
        public = row.variant == "auto" and kernel is not None
        beside = seconds_text((row.p50 or 0.0) - (kernel or 0.0)) if public else "-"
        made.append((row.op, row.mode, name_of(row), time_of(row, spread=True), beside))
    return made


LEGEND = (
    "time: median (p20..p80) of interleaved rounds; ~: the intervals overlap, the difference is noise. "
    "rate: of the least traffic (every input and output moved once) where memory is the limit, else of the visible "
    "pairs' products. floors: copying the same bytes in existing memory, where memory is the limit, and the call's "
    "FLOPs at 70 % of the rate of torch's product of 1,024 in the dtype or in float32; time / floor: over the larger. "
    "error: over what the tolerance rule allows against float64, fine up to 1."
)


# ---- Noise ----

BUSY = 0.125  # of the machine's processors, used by others or stolen
UNSTEADY = 0.5  # (p80 - p20) / p50 of the copy's times, median over jobs; 0.25 in a quiet run on 2 virtual processors


def copies_spread(rows: Iterable[Row]) -> float | None:
    """How far the copy's times lie apart, (p80 - p20) / p50, the median over all jobs; None without copies."""
    spreads = [
        (r.p80 - r.p20) / r.p50
        for r in newest(rows)
        if r.provider == "copy" and r.p20 and r.p50 and r.p80 and r.samples > 2
    ]
    return statistics.median(spreads) if spreads else None


def noise(rows: Iterable[Row], load: Load | None = None) -> str:
    """Whether the machine was quiet, with the numbers; without the run's ``load`` from the copies alone, if noisy."""
    spread, said, busy = copies_spread(rows), [], False
    if load is not None:
        cores, (others, stolen) = os.cpu_count() or 1, load.so_far()
        busy = max(others, stolen) > BUSY * cores
        said += [f"others used {others:.2f} of {cores} processors, the hypervisor took {stolen:.2f}"]
        if load.average is not None:
            said += [f"the load average before was {load.average:.2f}"]
    if spread is not None:
        busy = busy or spread > UNSTEADY
        said += [f"copies of the same bytes differ by {spread:.0%} (p20 to p80, over the median)"]
    if busy:
        return f"The machine was busy, times are too long and noisy: {'; '.join(said)}."
    return f"The machine was quiet: {'; '.join(said)}." if load is not None else ""


# ---- One number for many workloads ----


@dataclass(frozen=True)
class Bar:
    """The jobs of one operator over several workloads, in one mode, dtype and case; each has a peer."""

    lines: list[Line]

    @property
    def job(self) -> Row:
        """One of them."""
        return self.lines[0].job

    @property
    def what(self) -> str:
        return self.job.mode + ("" if self.job.case == "plain" else f", {self.job.case}")

    @property
    def speedups(self) -> list[float]:
        """The fastest peer's time over vdcore's, one per workload."""
        return [line.speedup for line in self.lines if line.speedup is not None]

    @property
    def over_copy(self) -> list[float]:
        """vdcore's time over that of copying the same bytes, one per workload."""
        return [line.over_copy for line in self.lines if line.over_copy is not None]


def geomean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def bars(found: Sequence[Line], ops: Sequence[str] = ("temporal_attention",)) -> list[Bar]:
    """Every mode, dtype and case of these operators, in the order of measurement; jobs without a peer are left out."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in found:
        job = line.job
        if job.op in ops and line.speedup is not None:
            groups.setdefault((job.op, job.case, job.mode, job.dtype, job.device), []).append(line)
    return list(map(Bar, groups.values()))


BAR_HEADER: tuple[str, ...] = ("operator", "mode", "dtype", "workloads")
BAR_HEADER += ("best peer / vdcore: geomean", "minimum", "vdcore / copy: geomean", "maximum")


def bar_cells(bar: Bar) -> tuple[str, ...]:
    """One table row, as :data:`BAR_HEADER` names it."""
    job, worst = bar.job, min(bar.lines, key=lambda line: line.speedup or 0.0).job.workload
    copies = (f"{geomean(bar.over_copy):.2f}", f"{max(bar.over_copy):.2f}") if bar.over_copy else ("-", "-")
    minimum = f"{min(bar.speedups):.2f}x ({worst})"
    return job.op, bar.what, job.dtype, str(len(bar.lines)), f"{geomean(bar.speedups):.2f}x", minimum, *copies


def bar_text(bar: Bar) -> str:
    """``"temporal_attention on cpu, float32, fwd, 4 workloads: 1.8x the best peer (minimum 1.7x), 2.7x copy time"``."""
    job, copies = bar.job, f", {geomean(bar.over_copy):.2f}x the time of a copy" if bar.over_copy else ""
    return (
        f"{job.op} on {job.device}, {job.dtype}, {bar.what}, {len(bar.lines)} workloads: "
        f"{geomean(bar.speedups):.2f}x as fast as the best peer (minimum {min(bar.speedups):.2f}x){copies}"
    )
