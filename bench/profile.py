"""Memory and time against frames: full 3D attention, spatial and temporal attention, and a window of frames."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from vdcore.bench import machine
from vdcore.bench.curves import PROFILE
from vdcore.bench.job import Job
from vdcore.bench.jobs import SpatialJob, TemporalJob, VideoJob, make
from vdcore.bench.memory import Point, PointError, backend_for, count, in_process, measure_memory, measure_time
from vdcore.bench.results import Journal, Row
from vdcore.bench.runner import blank
from vdcore.bench.timing import Spread
from vdcore.bench.workloads import Budget, Shape, Workload, load, scaled

from vdcore import FrameMask

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
    total, number = sum(map(len, curves)), 0
    for curve in curves:
        rate = 0.0  # FLOP/s of the last measured point of this curve
        for point in curve:
            watch(point, number, total)
            rows = list(measure(point, settings, rate))
            journal.add(rows)
            done(point, rows)
            number += 1
            took = next((r.p50 for r in rows if r.metric == "time" and r.status == "ok"), None)
            rate = point.flops() / took if took else rate


def measure(point: Point, settings: Settings, rate: float) -> Iterable[Row]:
    """A memory row and a time row; predicted where the point would not fit the limits."""
    base = row_for(point)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        skipped = replace(base, status="skipped", reason="no GPU is visible to torch")
        return [replace(skipped, metric="memory", unit="bytes"), skipped]
    served = f"served by {' and '.join(map(backend_for, point.jobs))}" if point.attention == "vdcore" else ""
    memory, clock = replace(base, metric="memory", unit="bytes"), base
    need, formula = count(point)
    limit = min(settings.memory_limit, machine.memory_limit(settings.device))
    guess = point.flops() / (rate or FIRST_GUESS * torch.get_num_threads())
    basis = "at the rate of the point before" if rate else "at a guessed rate"
    inputs = sum(job.memory() for job in point.jobs[:1])
    too_much = need + inputs > limit
    too_long = guess > settings.time_limit and bool(rate)
    too_late = time.monotonic() > settings.until
    if too_much or too_long or too_late:
        says = f"needs {machine.bytes_text(need)} = {formula}"
        if too_much:
            says += f", the limit is {machine.bytes_text(limit)}"
        slow = f"about {machine.seconds_text(guess)} a call {basis}"
        if too_long:
            slow += f", the limit is {machine.seconds_text(settings.time_limit)}"
        if too_late:
            slow += "; the time of the run was over"
        return [
            replace(memory, status="predicted", p50=float(need), reason=says if too_much else f"{says}; {slow}"),
            replace(clock, status="predicted", p50=guess, reason=slow if too_long else f"{slow}; {says}"),
        ]
    try:
        found = in_process(measure_memory, point, limit)
    except PointError as error:
        return [replace(row, status="failed", reason=str(error)[:300]) for row in (memory, clock)]
    peak = float(found.bytes)
    memory = replace(
        memory,
        p20=peak,
        p50=peak,
        p80=peak,
        samples=1,
        reason="; ".join(filter(None, (f"should need {formula}", served))),
    )
    if found.seconds > 2 * settings.time_limit:
        note = "one cold call" + (f"; {served}" if served else "")
        return [memory, _timed(clock, Spread.of([found.seconds]), base.allocator, note)]
    try:
        timed = in_process(measure_time, point, int(peak))
    except PointError as error:
        return [memory, replace(clock, status="failed", reason=str(error)[:300])]
    return [memory, _timed(clock, timed.spread, timed.allocator, served)]


def _timed(row: Row, spread: Spread, allocator: str, reason: str = "") -> Row:
    p20, p50, p80 = spread.p20, spread.p50, spread.p80
    return replace(row, p20=p20, p50=p50, p80=p80, samples=spread.samples, allocator=allocator, reason=reason)
