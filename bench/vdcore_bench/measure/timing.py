"""Timing that can be believed: all providers of a job in interleaved rounds, warm, as medians with p20 and p80."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

ROUNDS = 9
FEWEST = 5
FEWEST_BEHIND = 3


@dataclass
class Sample:
    """One timed call.

    Args:
        faults: minor page faults, where the clock counts them.
        host: seconds of Python until the call was enqueued, where the GPU's are ``seconds``.
        queued: the GPU began only when all of the call was enqueued: ``seconds`` hold no Python.
    """

    seconds: float
    faults: int | None = None
    host: float | None = None
    queued: bool = True


class Clock(Protocol):
    def measure(self, call: Callable[[], Any]) -> Sample:
        """Runs the call once. Its result is freed after the clock has stopped."""


class CpuClock:
    def measure(self, call: Callable[[], Any]) -> Sample:
        import resource

        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        del result
        return Sample(seconds, faults)


class CudaClock:
    """CUDA events around a call that waits in the stream until Python has enqueued all of it.

    First a buffer larger than L2 is read, which evicts what the last call left there and leaves no dirty lines whose
    write-back the call would pay for. Then the GPU sleeps, longer than Python needs to launch the call: the events
    enclose kernels and not Python, however short they are. A call that takes longer to launch is measured again behind
    a longer sleep, once; a sample whose launch still outlasted it says so.

    Args:
        cuda: the module torch.cuda, or what a test puts in its place.
        flush_bytes: 256 MiB are five times the L2 of a Hopper GPU.
    """

    HERTZ = 2e9  # cycles of a sleep's second; GPUs clock lower, and sleep longer
    SHORTEST, LONGEST = 2e-3, 0.1  # seconds

    def __init__(self, device: str = "cuda", cuda: Any = torch.cuda, flush_bytes: int = 256 * 2**20) -> None:
        self.cuda = cuda
        self.buffer = torch.ones(flush_bytes // 4, dtype=torch.int32, device=device) if flush_bytes else None
        self.sink: torch.Tensor | None = None
        self.sleep = self.SHORTEST

    def measure(self, call: Callable[[], Any]) -> Sample:
        sample = self._once(call)
        assert sample.host is not None
        if not sample.queued and 1.5 * sample.host > self.sleep < self.LONGEST:
            self.sleep = min(1.5 * sample.host, self.LONGEST)
            sample = self._once(call)
        return sample

    def _once(self, call: Callable[[], Any]) -> Sample:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        if self.buffer is not None:
            self.sink = self.buffer.sum()
        self.cuda._sleep(int(self.sleep * self.HERTZ))
        begin.record()
        called = time.perf_counter()
        result = call()
        host = time.perf_counter() - called
        end.record()
        end.synchronize()
        del result
        return Sample(begin.elapsed_time(end) * 1e-3, host=host, queued=host < self.sleep)


def clock_for(device: str) -> Clock:
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


@dataclass
class Contender:
    """One provider's call in a race.

    Args:
        call: what is timed; takes what ``prepare`` returned.
        prepare: runs before every call, not timed: the forward whose backward is measured.
        samples: grows by one per round.
        estimate: seconds of a call, before the race.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    estimate: float = 0.0

    def run(self, clock: Clock) -> Sample:
        state = self.prepare()
        return clock.measure(lambda: self.call(state))

    @property
    def spread(self) -> Spread:
        return Spread.of([sample.seconds for sample in self.samples])


@dataclass(frozen=True)
class Spread:
    """Percentiles of some samples, and how many there are."""

    p20: float
    p50: float
    p80: float
    samples: int

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Linear interpolation between order statistics."""
        ordered = sorted(values)

        def quantile(q: float) -> float:
            at = q * (len(ordered) - 1)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (at - low) * (ordered[high] - ordered[low])

        return Spread(quantile(0.2), statistics.median(ordered), quantile(0.8), len(ordered))


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector does not run inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rounds_for(
    estimates: dict[str, float], budget: float, rounds: int = ROUNDS, ours: frozenset[str] = frozenset()
) -> dict[str, int]:
    """How many rounds each contender runs in.

    Close intervals matter for ours and for what may be the fastest of the others: within a sixth of it. The rest
    runs in the fewest rounds, or, if a call takes an eighth of the budget, not again: its estimate is its sample.

    Args:
        estimates: seconds per call.
        budget: seconds for all rounds together.
        ours: run in all rounds, however slow.
    """
    fastest = min((t for name, t in estimates.items() if name not in ours), default=0.0)
    behind = {name: t for name, t in estimates.items() if t > 7 / 6 * fastest and name not in ours}
    counts = {name: 0 if t > budget / 8 else FEWEST_BEHIND for name, t in behind.items()}
    left = budget - sum(behind[name] * n for name, n in counts.items())
    a_round = sum(t for name, t in estimates.items() if name not in behind)
    affordable = int(left / a_round) if a_round > 0 else rounds
    return {name: counts.get(name, max(FEWEST, min(rounds, affordable))) for name in estimates}


def race(contenders: dict[str, Contender], rounds: dict[str, int], clock: Clock, until: float = math.inf) -> None:
    """Runs every contender once per round, each round starting with another one, so that drift hits all alike.

    Samples stand in the contenders from the first round on: an interrupt loses at most the call that was running.

    Args:
        until: of time.monotonic(); after it and the fewest rounds no other round begins.
    """
    names = list(contenders)
    with no_collection():
        for i in range(max(rounds.values(), default=0)):
            if i >= FEWEST_BEHIND and time.monotonic() > until:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if i < rounds[name]:
                    contenders[name].samples.append(contenders[name].run(clock))


def race_within(
    contenders: dict[str, Contender],
    seconds: float,
    rounds: int,
    clock: Clock,
    *,
    ours: frozenset[str] = frozenset(),
    apart: frozenset[str] = frozenset(),
    until: float = math.inf,
) -> None:
    """A race of as many rounds as :func:`rounds_for` gives, by the estimates; with none, the estimate is the sample.

    Args:
        apart: run in the most rounds and count for nothing: the memcpy baseline.
    """
    counts = rounds_for({n: c.estimate for n, c in contenders.items() if n not in apart}, seconds, rounds, ours)
    most = max(counts.values(), default=rounds)
    counts |= dict.fromkeys(apart, most)
    for name, count in counts.items():
        if count == 0:
            contenders[name].samples.append(Sample(contenders[name].estimate))
    race(contenders, counts, clock, until)


def race_calls(calls: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, Spread]:
    """Seconds of calls that need no preparation, after one run each that is not counted."""
    clock = clock_for(device)
    contenders = {name: Contender(lambda _, call=call: call()) for name, call in calls.items()}  # type: ignore[misc]
    for contender in contenders.values():
        contender.run(clock)
    race(contenders, dict.fromkeys(contenders, rounds), clock)
    return {name: contender.spread for name, contender in contenders.items()}
