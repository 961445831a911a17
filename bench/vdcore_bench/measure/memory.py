"""Peak memory and warm time of calls; of a point of the profile in a fresh process, and what it should need.

On the CPU the peak is the process's highest resident size (VmHWM, set back after the inputs were allocated) minus the
size before the call; on CUDA it is the allocator's own count.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import vdcore
from vdcore.ops.frame_attention.cpu import dq_buffers
from vdcore_bench.jobs.base import Job, Tensors
from vdcore_bench.measure import machine
from vdcore_bench.measure.judge import flat, gradients
from vdcore_bench.measure.timing import Spread, clock_for
from vdcore_bench.peers import PEERS
from vdcore_bench.peers.adapter import Function, masked, materialized
from vdcore_bench.suites.runner import heap, touch_heap

ATTENTIONS = ("naive", "sdpa", "vdcore")
LONG = 4.0  # seconds; a call that takes longer is timed once
ENOUGH = 1.5  # seconds of timed calls


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
    """Bytes beyond the inputs that a point should need, and the formula; N tokens, e bytes an element.

    naive: scores and probabilities of all pairs are alive at once, H N N e each; backward adds a third. A dense mask
    is N N bytes, and torch's CPU kernel makes it N N e more. Fused attention needs its outputs, a float32 log-sum-exp,
    and with gradients those of q, k and v; torch's, which lays results and gradients out anew, both twice. The
    reference backend needs float32 copies and the scores of one frame.
    """
    needs = [_count_one(job, point) for job in point.jobs]
    return max(needs)


def _count_one(job: Job, point: Point) -> tuple[int, str]:
    s, e = job.shape, job.dtype.itemsize
    out = s.B * s.T * s.S * s.H * s.D * e
    lse = s.B * s.T * s.S * s.H * 4
    keys = s.B * s.T * s.S * 2 * s.G * s.D * e
    back = 2 * (out + keys) if job.has_backward else 0
    back_text = " + 2 gradients of q, k, v" if job.has_backward else ""
    if point.attention == "naive":
        n = "3" if job.has_backward else "2"
        return materialized(job) + 2 * out + back, f"{n} H N N e + 2 outputs{back_text}" + " + N N" * masked(job)
    if "mask" in point.variant:
        n_squared = (s.T * s.S) ** 2
        return n_squared * (1 + e) + 2 * out + lse + back, "N N (1 + e) of mask + 2 outputs + lse" + back_text
    if point.attention == "vdcore" and backend_for(job) == "reference":
        scores = 3 * s.B * s.H * s.S * int(s.T * s.S * job.mask.density(s.T) + 1) * 4
        copies = 3 * (out + keys) * 4 // e
        if job.has_backward:
            scores *= s.T
        return scores + copies + out + back, "float32 copies and scores of the reference backend" + back_text
    if point.attention == "vdcore" and backend_for(job) != "sdpa":
        if not job.has_backward:
            return out + lse, "output + lse"
        parts = _parts_of_dq(job)
        text = "output + lse + gradients of q, k, v" + " + float32 parts of that of q" * bool(parts)
        return out + lse + out + keys + parts, text
    return 2 * out + lse + back, f"2 outputs + lse{back_text}"


def _parts_of_dq(job: Job) -> int:
    """Bytes in which the CPU engine adds up the gradients of queries of frame attention."""
    s = job.shape
    if job.device != "cpu" or job.op not in ("spatial_attention", "video_attention"):
        return 0
    components = s.B * s.T if job.op == "spatial_attention" else s.B
    rows = s.S if job.op == "spatial_attention" else s.T * s.S
    floats = rows * (s.H // s.G) * -(-s.D // 16) * 16
    return 4 * floats * dq_buffers(components * s.G, floats, torch.get_num_threads())[0]


def backend_for(job: Job) -> str:
    """Who serves the job, asked with one token a frame."""
    small = replace(job, shape=replace(job.shape, rows=1, columns=1))
    with torch.set_grad_enabled(job.has_backward):
        return vdcore.explain(job.op, **small.arguments(_leaves(small)))[0][0]


# ---- Peak memory and warm time of any call ----


@dataclass(frozen=True)
class Peak:
    """What a call took: bytes beyond what was there before it, its result included, and seconds."""

    bytes: int
    seconds: float


def peak_of(call: Callable[[], Any], device: str = "cpu") -> Peak:
    """The most memory that a call takes. Make it once before, so that starting threads and loading code do not count.

    Whoever allocates, on the CPU: what others in the process take meanwhile counts as well.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, time.perf_counter() - begin)
    with machine.returning_memory():
        before, begin = _reset_peak(), time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        peak = max(_peak() - before, 0)
        del result
    return Peak(peak, seconds)


def _reset_peak() -> int:
    """Sets the process's peak back to its present resident size, which is returned."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Timed:
    """Seconds of warm calls, and the allocator as rows say it."""

    spread: Spread
    allocator: str


def time_warm(call: Callable[[], Any], device: str, need: int) -> Timed:
    """Calls in touched memory: as many as fit into :data:`ENOUGH`, at least three unless one takes :data:`LONG`.

    Args:
        need: bytes that a call takes.
    """
    cuda = device.startswith("cuda")
    if not cuda:
        touch_heap(min(2 * need, machine.memory_limit()))
    clock = clock_for(device)
    call()
    samples = [clock.measure(call).seconds]
    while len(samples) < 9 and (sum(samples) < ENOUGH or (len(samples) < 3 and samples[0] < LONG)):
        samples.append(clock.measure(call).seconds)
    return Timed(Spread.of(samples), "torch" if cuda else heap())


def predicted_peak(module: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Peak bytes of a call beyond the module's parameters, without running it: on fake tensors, for any device.

    Module and inputs must have been made, and the call is made, inside one ``torch._subclasses.FakeTensorMode``. What
    an operator takes inside of itself is not seen.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(module)
    with tracker:
        call()
    peaks = tracker.get_tracker_snapshot("peak")
    total = max(sum(sizes.values()) // 2 if "Total" in sizes else sum(sizes.values()) for sizes in peaks.values())
    return total - sum(p.nbytes for p in module.parameters())


# ---- What a point needs ----


def _leaves(job: Job) -> Tensors:
    tensors = job.tensors()
    for name in job.learned if job.has_backward else ():
        tensors[name].requires_grad_()
    return tensors


def _call(point: Point, tensors: Tensors, dout: list[list[torch.Tensor]]) -> Callable[[], None]:
    """All jobs of the point in order; every result is freed before the next job."""
    functions = [function_of(job, point.attention, point.variant) for job in point.jobs]

    def call() -> None:
        for job, function, dy in zip(point.jobs, functions, dout):
            with torch.set_grad_enabled(job.has_backward):
                outputs = flat(function(**job.arguments(tensors)))
            if job.has_backward:
                gradients(outputs, [tensors[name] for name in job.learned], dy)

    return call


def _incoming(point: Point) -> list[list[torch.Tensor]]:
    return [
        [torch.ones(size, dtype=job.dtype, device=job.device) for size in job.output_sizes()]
        if job.has_backward
        else []
        for job in point.jobs
    ]


def _small(point: Point) -> Point:
    """The same calls on two tokens: starts threads and loads code, so that the peak is not theirs."""
    jobs = tuple(replace(job, shape=replace(job.shape, T=2, rows=1, columns=1)) for job in point.jobs)
    return replace(point, jobs=jobs)


def measure_memory(point: Point, limit: int) -> Peak:
    """Of one call beyond its inputs. An allocation beyond the limit raises. For a fresh process."""
    device = point.jobs[0].device
    _call(_small(point), _leaves(_small(point).jobs[0]), _incoming(_small(point)))()
    with machine.returning_memory():  # already where inputs are drawn: what that leaves free counts as taken
        tensors, dout = _leaves(point.jobs[0]), _incoming(point)
        if sys.platform == "linux" and not device.startswith("cuda"):
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit,) * 2)
        return peak_of(_call(point, tensors, dout), device)


def measure_time(point: Point, need: int) -> Timed:
    """Of warm calls. For a fresh process."""
    _call(_small(point), _leaves(_small(point).jobs[0]), _incoming(_small(point)))()
    tensors, dout = _leaves(point.jobs[0]), _incoming(point)
    return time_warm(_call(point, tensors, dout), point.jobs[0].device, need)


# ---- In a process of its own ----


class PointError(RuntimeError):
    """The process of a point failed; the message says how."""


def _child(connection: Connection, threads: int, function: Callable[..., Any], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    try:
        connection.send((function(*arguments), None))
    except BaseException as error:
        connection.send((None, "".join(traceback.format_exception_only(error)).strip()))


def in_process(function: Callable[..., Any], *arguments: Any, timeout: float = 600.0) -> Any:
    """The function's result from a fresh process, forked off one that has only imported torch.

    Raises:
        PointError: if it fails, is killed, or takes longer than ``timeout`` seconds.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["vdcore_bench.measure.memory"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_child, args=(theirs, torch.get_num_threads(), function, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise PointError(f"it took longer than {timeout:.0f} s")
        result, error = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise PointError(f"its process ended with {how}" + (", out of memory" if code == -9 else "")) from None
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()
        ours.close()
    if error is not None:
        raise PointError(error)
    return result
