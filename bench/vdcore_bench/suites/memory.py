"""Memory and time against frames: full 3D attention, spatial and temporal attention, and a window of frames."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from vdcore import FrameMask
from vdcore_bench.jobs import SpatialJob, TemporalJob, VideoJob, make
from vdcore_bench.jobs.base import Job
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import Journal, Row
from vdcore_bench.measure.memory import (
    Peak,
    Point,
    PointError,
    Timed,
    backend_for,
    count,
    in_process,
    measure_memory,
    measure_time,
)
from vdcore_bench.measure.timing import Spread
from vdcore_bench.report.curves import PROFILE
from vdcore_bench.suites.runner import blank
from vdcore_bench.workloads import Budget, Shape, Workload, load, scaled

FRAMES = (8, 16, 32, 64, 128, 256, 512)
WORKLOAD = "ltx-2b-704p"
WINDOW = 30  # latent frames: five seconds of most models
SIZED_AT = 128  # frames at which full 3D attention costs what the shape is cut to
FLOPS_PER_THREAD = 7e10
SHORT = 1.5  # seconds that one call may take in the benchmark's default set
FIRST_GUESS = 2e10  # FLOP/s of a thread, until a point of the series was measured


@dataclass(frozen=True)
class Settings:
    """What a profile runs.

    Args:
        memory_limit: bytes beyond the inputs that a point may take.
        time_limit: seconds that one call may take.
        until: of time.monotonic(); points that have not begun by then are predicted.
    """

    frames: tuple[int, ...] = FRAMES
    attentions: tuple[str, ...] = ("naive", "sdpa", "vdcore")
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    memory_limit: int = 2**62
    time_limit: float = 20.0
    until: float = math.inf

    @property
    def most_memory(self) -> int:
        """The limit, or what the machine has."""
        return min(self.memory_limit, machine.memory_limit(self.device))


def shape_for(workload: Workload, device: str, threads: int) -> Shape:
    """The workload's shape without text; on a CPU one head, and rows of tokens cut until a point takes seconds."""
    shape = replace(workload.shape(), T=SIZED_AT, L=0)
    if device.startswith("cuda"):
        return shape
    limit = Budget(threads * FLOPS_PER_THREAD, float("inf"))

    def fits(s: Shape) -> bool:
        return limit.flops >= 4.0 * s.D * s.H * (s.T * s.S) ** 2

    return scaled(replace(shape, H=1, G=1), ("rows",), fits)


def series(workload: Workload, settings: Settings) -> list[list[Point]]:
    """One list a curve, in the order of frames: every pattern with every attention and variant."""
    base = shape_for(workload, settings.device, torch.get_num_threads())
    window = workload.mask if workload.mask != FrameMask.full() else FrameMask.window(WINDOW)

    def job(op: str, frames: int, mask: FrameMask | None = None) -> Job:
        made = make(
            op,
            workload,
            mode=settings.mode,
            dtype=settings.dtype,
            device=settings.device,
            mask=mask,
            shape=replace(base, T=frames),
        )
        return replace(made, original=replace(made.original, T=frames))

    def jobs(pattern: str, frames: int) -> tuple[Job, ...]:
        if pattern == "factorised":
            return job("spatial_attention", frames), job("temporal_attention", frames, FrameMask.full())
        return (job("video_attention", frames, FrameMask.full() if pattern == "full" else window),)

    curves = []
    for pattern in ("full", "factorised", "window"):
        for attention in settings.attentions:
            variants = ("one call a run", "dense mask") if (pattern, attention) == ("window", "sdpa") else ("",)
            for variant in variants:
                curves.append([Point(jobs(pattern, n), attention, variant) for n in sorted(set(settings.frames))])
    return curves


def pattern_of(point: Point) -> str:
    """As rows and plots name it."""
    if len(point.jobs) > 1:
        return "spatial + temporal"
    job = point.jobs[0]
    return "full 3D" if job.mask == FrameMask.full() else f"window, {job.case}"


def row_for(point: Point) -> Row:
    """Everything about the point but its numbers."""
    kinds: dict[type, str] = {SpatialJob: "spatial", TemporalJob: "temporal", VideoJob: "video"}
    op = " + ".join(kinds[type(job)] for job in point.jobs) if len(point.jobs) > 1 else point.jobs[0].op
    row = blank(point.jobs[0])
    return replace(
        row,
        op=op,
        case=PROFILE + pattern_of(point),
        provider=point.attention,
        variant=point.variant,
        flops=point.flops(),
        bytes=None,
        allocator="torch" if point.jobs[0].device.startswith("cuda") else "glibc, default thresholds",
    )


def run(
    workloads: Sequence[str],
    settings: Settings,
    journal: Journal,
    watch: Callable[[Point, int, int], None] = lambda point, number, total: None,
    done: Callable[[Point, list[Row]], None] = lambda point, rows: None,
) -> None:
    """Measures or predicts every point; rows stand in the journal as soon as they exist."""
    curves = [curve for name in workloads for curve in series(load()[name], settings)]
    follow(curves, lambda point, rate: measure(point, settings, rate), Point.flops, journal, watch, done)


def measure(point: Point, settings: Settings, rate: float) -> list[Row]:
    """A memory row and a time row; predicted where the point would not fit the limits."""
    base = row_for(point)
    if lacks_gpu(settings.device):
        return without_gpu(base)
    need, formula = count(point)
    seconds = point.flops() / (rate or FIRST_GUESS * torch.get_num_threads())
    inputs = sum(job.memory() for job in point.jobs[:1])
    served = f"served by {' and '.join(map(backend_for, point.jobs))}" if point.attention == "vdcore" else ""
    return rows_of(
        base,
        Estimate(need, f"= {formula}", seconds, bool(rate), inputs),
        settings,
        partial(measure_memory, point, settings.most_memory),
        partial(measure_time, point),
        note="; ".join(filter(None, (f"should need {formula}", served))),
        time_note=served,
    )


# ---- Any point against frames: what other profiles share ----

P = TypeVar("P")


@dataclass(frozen=True)
class Estimate:
    """What a point should take, before it is run.

    Args:
        need: bytes beyond the inputs.
        how: where that number comes from, as it follows the number.
        seconds: of a call; 0: unknown.
        follows: the seconds are at the rate of the curve's point before; else they are a guess, and decide nothing.
        inputs: bytes.
    """

    need: int
    how: str
    seconds: float
    follows: bool = True
    inputs: int = 0


def follow(
    curves: Sequence[Sequence[P]],
    measure: Callable[[P, float], list[Row]],
    work: Callable[[P], float],
    journal: Journal,
    watch: Callable[[P, int, int], None] = lambda point, number, total: None,
    done: Callable[[P, list[Row]], None] = lambda point, rows: None,
) -> None:
    """Measures the points of every curve in order.

    Args:
        measure: rows of a point, given the rate of the last measured point of its curve, work a second; 0: unknown.
        work: of a point, which its time follows: operations, say.
        watch: is told the point, its number, and how many there are.
        done: is told the rows of a point.
    """
    total, number = sum(map(len, curves)), 0
    for curve in curves:
        rate = 0.0
        for point in curve:
            watch(point, number, total)
            rows = measure(point, rate)
            journal.add(rows)
            done(point, rows)
            number += 1
            took = next((r.p50 for r in rows if r.metric == "time" and r.status == "ok"), None)
            rate = work(point) / took if took else rate


def lacks_gpu(device: str) -> bool:
    return device.startswith("cuda") and not torch.cuda.is_available()


def _both(base: Row) -> tuple[Row, Row]:
    """Of memory, and of time."""
    return replace(base, metric="memory", unit="bytes"), base


def without_gpu(base: Row) -> list[Row]:
    return [replace(row, status="skipped", reason="no GPU is visible to torch") for row in _both(base)]


def cannot(base: Row, error: Exception) -> list[Row]:
    """Rows of a point that the one who is measured does not run."""
    reason = str(error) if isinstance(error, PointError) else f"{type(error).__name__}: {error}"
    return [replace(row, status="failed", reason=reason[:300]) for row in _both(base)]


def rows_of(
    base: Row,
    estimate: Estimate,
    settings: Settings,
    find_memory: Callable[[], Peak],
    find_time: Callable[[int], Timed],
    note: str = "",
    time_note: str = "",
) -> list[Row]:
    """A memory row and a time row of one point, each measured in a fresh process; predicted if it would not fit.

    Args:
        base: everything about the point but its numbers.
        find_memory, find_time: run in these processes, the second with the peak that the first has found.
        note, time_note: the reasons of measured rows: what to know about them.
    """
    not_run = _predicted(base, estimate, settings)
    if not_run:
        return not_run
    memory, clock = _both(base)
    try:
        found: Peak = in_process(find_memory)
    except PointError as error:
        return cannot(base, error)
    memory = memory.measured(Spread.of([float(found.bytes)]), reason=note)
    if found.seconds > 2 * settings.time_limit:
        time_note = "; ".join(filter(None, ("one cold call", time_note)))
        return [memory, clock.measured(Spread.of([found.seconds]), reason=time_note)]
    try:
        timed: Timed = in_process(find_time, found.bytes)
    except PointError as error:
        return [memory, replace(clock, status="failed", reason=str(error)[:300])]
    return [memory, clock.measured(timed.spread, allocator=timed.allocator, reason=time_note)]


def _predicted(base: Row, estimate: Estimate, settings: Settings) -> list[Row]:
    """Both rows of a point that would not fit the limits, with what it would need; none if it would fit."""
    seconds = estimate.seconds
    too_much = estimate.need + estimate.inputs > settings.most_memory
    too_long = estimate.follows and seconds > settings.time_limit
    too_late = time.monotonic() > settings.until
    if not (too_much or too_long or too_late):
        return []
    large = f"needs {machine.bytes_text(estimate.need)} {estimate.how}"
    if too_much:
        large += f", the limit is {machine.bytes_text(settings.most_memory)}"
    basis = "at the rate of the point before" if estimate.follows else "at a guessed rate"
    slow = [f"about {machine.seconds_text(seconds)} a call {basis}"] if seconds else []
    if too_long:
        slow[0] += f", the limit is {machine.seconds_text(settings.time_limit)}"
    if too_late:
        slow.append("the time of the run was over")
    memory, clock = (replace(row, status="predicted") for row in _both(base))
    return [
        replace(memory, p50=float(estimate.need), reason=large if too_much else "; ".join([large, *slow])),
        replace(clock, p50=seconds or None, reason="; ".join(slow if too_long else [*slow, large])),
    ]
