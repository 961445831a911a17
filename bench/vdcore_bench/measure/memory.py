"""Peak memory and warm time of a call, measured in a fresh process, and predicted on fake tensors.

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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vdcore_bench.measure import machine
from vdcore_bench.measure.machine import heap, touch_heap
from vdcore_bench.measure.timing import Spread, clock_for

LONG = 4.0  # seconds; a call that takes longer is timed once
ENOUGH = 1.5  # seconds of timed calls


@dataclass(frozen=True)
class Peak:
    """What a call took: bytes beyond what was there before it, its result included, and seconds."""

    bytes: int
    seconds: float


def peak_of(call: Callable[[], Any], device: str = "cpu") -> Peak:
    """The most memory that a call takes. Make it once before, so that starting threads and loading code do not count.

    On the CPU, what other threads of the process allocate meanwhile counts as well.
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
        return status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return status("VmHWM")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def status(field: str) -> int:
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
