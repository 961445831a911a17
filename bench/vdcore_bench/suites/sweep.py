"""Any call against frames: its peak memory and its time, each in a fresh process, or predicted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import Journal, Row, text_of
from vdcore_bench.measure.memory import Peak, PointError, Timed, in_process
from vdcore_bench.measure.timing import Spread

FRAMES = (8, 16, 32, 64, 128, 256, 512)


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
        measure: rows of a point, given the rate of the last measured point of its curve, work per second; 0: unknown.
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
    """Rows of a point that the measured model does not run."""
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
        time_note = text_of("one cold call", time_note)
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
    slow = [f"about {machine.seconds_text(seconds)} per call {basis}"] if seconds else []
    if too_long:
        slow[0] += f", the limit is {machine.seconds_text(settings.time_limit)}"
    if too_late:
        slow.append("the time of the run was over")
    memory, clock = (replace(row, status="predicted") for row in _both(base))
    return [
        replace(memory, p50=float(estimate.need), reason=large if too_much else "; ".join([large, *slow])),
        replace(clock, p50=seconds or None, reason="; ".join(slow if too_long else [*slow, large])),
    ]
