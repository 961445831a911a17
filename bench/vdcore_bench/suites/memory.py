"""Memory and time against frames: full 3D attention, spatial and temporal attention, and a window of frames."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import vdcore
from vdcore import FrameMask
from vdcore.ops import native
from vdcore.ops.call import mask_numbers
from vdcore_bench.jobs import SpatialJob, TemporalJob, VideoJob, make
from vdcore_bench.jobs.base import DTYPES, Job
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import PROFILE, Journal, Row, Watch, text_of
from vdcore_bench.measure.memory import Peak, Timed, peak_of, status, time_warm
from vdcore_bench.peers import PEERS
from vdcore_bench.peers.adapter import Function, masked, scores
from vdcore_bench.suites import Options
from vdcore_bench.suites.runner import Calls, blank
from vdcore_bench.suites.sweep import Estimate, Settings, follow, lacks_gpu, rows_of, without_gpu
from vdcore_bench.workloads import Budget, Shape, Workload, load, scaled

TAKES = frozenset({"workloads", "modes", "dtypes", "memory_limit", "until"})
ATTENTIONS = ("naive", "sdpa", "vdcore")
WORKLOAD = "ltx-2b-704p"
WINDOW = 30  # latent frames: five seconds of most models
SIZED_AT = 128  # frames at which full 3D attention costs what the shape is cut to
FLOPS_PER_THREAD = 7e10
SHORT = 1.5  # seconds that one call may take in the benchmark's default set
FIRST_GUESS = 2e10  # FLOP/s of a thread, until a point of the series was measured


@dataclass(frozen=True)
class Point:
    """One attention at one number of frames.

    Args:
        jobs: run one after another: one job, or spatial and temporal attention.
        attention: one of :data:`ATTENTIONS`.
        variant: of the peer.
    """

    jobs: tuple[Job, ...]
    attention: str
    variant: str = ""

    @property
    def frames(self) -> int:
        return self.jobs[0].shape.T

    @property
    def title(self) -> str:
        return f"{pattern_of(self)}, {self.attention} {self.variant}, {self.frames} frames"

    def flops(self) -> float:
        """Of the pairs that this attention computes: naive and dense masks do not leave out the hidden ones."""
        dense = self.attention == "naive" or "mask" in self.variant
        return sum(replace(job, mask=vdcore.FrameMask()).flops() if dense else job.flops() for job in self.jobs)


def function_of(job: Job, attention: str, variant: str) -> Function:
    if attention == "vdcore":
        return getattr(vdcore, job.op)
    names = ("naive",) if attention == "naive" else ("sdpa[flash]", "sdpa[efficient]")
    for peer in PEERS:
        if peer.name in names and job.op in peer.ops and peer.why_not(job) is None:
            makers = peer.variants(job)
            if variant in makers or not variant:
                return (makers[variant] if variant else next(iter(makers.values())))()
    raise ValueError(f"{attention} has no variant {variant!r} of {job.op}")


# ---- What it should need ----


def count(point: Point) -> tuple[int, str]:
    """Bytes beyond the inputs that a point should need, and the formula; N tokens, e bytes per element.

    naive: scores and probabilities of all pairs are alive at once, H N N e each; backward adds a third. A dense mask
    is N N bytes, and torch's CPU kernel makes it N N e more. Fused attention needs its outputs, a float32 log-sum-exp,
    and with gradients those of q, k and v; torch's, which lays results and gradients out anew, both twice. The
    reference backend needs float32 copies and the scores of one frame.
    """
    counted = []
    for job in point.jobs:
        terms = _terms(job, point)
        counted.append((sum(size for size, _ in terms), " + ".join(text for _, text in terms)))
    return max(counted)


def _terms(job: Job, point: Point) -> list[tuple[int, str]]:
    """The terms of the sum, in bytes and in words."""
    s, e = job.shape, job.dtype.itemsize
    out = s.B * s.T * s.S * s.H * s.D * e
    keys = s.B * s.T * s.S * 2 * s.G * s.D * e
    lse, outputs = (s.B * s.T * s.S * s.H * 4, "lse"), (2 * out, "2 outputs")
    back = [(2 * (out + keys), "2 gradients of q, k, v")] if job.has_backward else []
    if point.attention == "naive":
        pairs = 3 if job.has_backward else 2
        mask = scores(job) // (s.B * s.H)
        found = [(pairs * scores(job) * e, f"{pairs} H N N e"), outputs, *back]
        return [*found, (mask, "N N")] if masked(job) else found
    if "mask" in point.variant:
        return [((s.T * s.S) ** 2 * (1 + e), "N N (1 + e) of mask"), outputs, lse, *back]
    if point.attention != "vdcore" or backend_for(job) == "sdpa":
        return [outputs, lse, *back]
    if backend_for(job) == "reference":
        frame = 3 * s.B * s.H * s.S * int(s.T * s.S * job.mask.density(s.T) + 1) * 4 * (s.T if job.has_backward else 1)
        copies = 3 * (out + keys) * 4 // e
        return [(frame + copies + out, "float32 copies and scores of the reference backend"), *back]
    if not job.has_backward:
        return [(out, "output"), lse]
    found = [(out, "output"), lse, (out + keys, "gradients of q, k, v")]
    parts = _parts_of_dq(job)
    return [*found, (parts, "float32 parts of that of q")] if parts else found


def _parts_of_dq(job: Job) -> int:
    """Bytes in which the CPU engine adds up the gradients of queries of frame attention."""
    s = job.shape
    if job.device != "cpu" or job.op not in ("spatial_attention", "video_attention"):
        return 0
    mask = vdcore.FrameMask.same_frame() if job.op == "spatial_attention" else job.mask
    groups = native.native().frame_groups(
        mask=mask_numbers(mask),
        batch=s.B,
        queries=s.T,
        keys=s.T,
        tokens=s.S,
        q_start=0,
        lengths=None,
        text=0,
        text_lengths=None,
        text_sees_video=False,
    )
    bytes_: int = groups.backward_plan(s.H, s.G, s.D, torch.get_num_threads())["bytes"]
    return bytes_


def backend_for(job: Job) -> str:
    """The backend that serves the job, asked with one token per frame."""
    small = replace(job, shape=replace(job.shape, rows=1, columns=1))
    with torch.set_grad_enabled(job.has_backward):
        return vdcore.explain(job.op, **small.arguments(small.leaves()))[0][0]


# ---- The points of a workload ----


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
    """One list per curve, in the order of frames: every pattern with every attention and variant."""
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
        if pattern == "factorized":
            return job("spatial_attention", frames), job("temporal_attention", frames, FrameMask.full())
        return (job("video_attention", frames, FrameMask.full() if pattern == "full" else window),)

    curves = []
    for pattern in ("full", "factorized", "window"):
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
        allocator="torch" if point.jobs[0].device.startswith("cuda") else machine.DEFAULT_THRESHOLDS,
    )


def run(options: Options, journal: Journal, watch: Watch) -> None:
    for mode in options.modes or ("fwd",):
        for dtype in options.dtypes or ("float32",):
            profile(options.workloads, options, journal, watch, mode=mode, dtype=DTYPES[dtype])


def profile(names: Sequence[str], options: Options, journal: Journal, watch: Watch, **settings: Any) -> None:
    """Measures or predicts every point; rows stand in the journal as soon as they exist.

    Args:
        names: of workloads; none: :data:`WORKLOAD`.
        settings: as :class:`Settings` has them.
    """
    limits = Settings(**{"device": options.device, "memory_limit": options.limit, "until": options.until, **settings})
    curves = [curve for name in names or (WORKLOAD,) for curve in series(load()[name], limits)]
    with watch.part("Memory and time against frames"):
        follow(
            curves,
            lambda point, rate: measure(point, limits, rate),
            Point.flops,
            journal,
            lambda point, number, total: watch.step(point.title, number, total),
            lambda point, rows: watch.done(rows),
        )


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
        note=text_of(f"should need {formula}", served),
        time_note=served,
    )


# ---- What a point needs ----


def _call(point: Point) -> Callable[[], None]:
    """All jobs of the point in order, on the first one's tensors; every result is freed before the next job."""
    tensors = point.jobs[0].leaves()
    runs = [(Calls(job, tensors), function_of(job, point.attention, point.variant)) for job in point.jobs]
    for calls, _ in runs:
        if calls.job.has_backward:
            job = calls.job
            calls.dout = [torch.ones(size, dtype=job.dtype, device=job.device) for size in job.output_sizes()]

    def call() -> None:
        for calls, function in runs:
            outputs = calls.forward(function)
            if calls.job.has_backward:
                calls.backward(outputs)
            del outputs

    return call


def _small(point: Point) -> Point:
    """The same calls on two tokens: starts threads and loads code, so that the peak is not theirs."""
    jobs = tuple(replace(job, shape=replace(job.shape, T=2, rows=1, columns=1)) for job in point.jobs)
    return replace(point, jobs=jobs)


def measure_memory(point: Point, limit: int) -> Peak:
    """Of one call beyond its inputs. An allocation beyond the limit raises. For a fresh process."""
    device = point.jobs[0].device
    _call(_small(point))()
    with machine.returning_memory():  # already where inputs are drawn: what that leaves free counts as taken
        call = _call(point)
        if sys.platform == "linux" and not device.startswith("cuda"):
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + limit,) * 2)
        return peak_of(call, device)


def measure_time(point: Point, need: int) -> Timed:
    """Of warm calls. For a fresh process."""
    _call(_small(point))()
    return time_warm(_call(point), point.jobs[0].device, need)
