"""Clocks, quantiles, rounds and races, with clocks that a test sets."""

import pytest

from vdcore_bench.measure import timing
from vdcore_bench.measure.timing import Contender, CudaClock, Sample, Spread, race, race_calls, rounds_for


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.at = self.cuda.now
        self.cuda.log.append("record")

    def synchronize(self):
        self.cuda.log.append("wait")

    def elapsed_time(self, other):
        return other.at - self.at


class FakeCuda:
    """Time passes only in calls, in milliseconds as CUDA events count."""

    def __init__(self):
        self.now, self.log, self.sleeps = 0.0, [], []

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        self.log.append("sleep")
        self.sleeps.append(cycles)


@pytest.fixture
def host(monkeypatch):
    """Python's seconds pass only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_the_cuda_clock_times_the_call_alone_and_in_seconds(host):
    cuda = FakeCuda()
    clock = CudaClock("cpu", cuda, flush_bytes=64)

    def call():
        assert clock.sink == 16, "a buffer has been read before the call"
        cuda.log.append("call")
        cuda.now += 3.0
        host[0] += 1e-3

    sample = clock.measure(call)
    assert (sample.seconds, sample.host, sample.queued) == (pytest.approx(3e-3), pytest.approx(1e-3), True)
    assert cuda.log == ["synchronize", "sleep", "record", "call", "record", "wait"]
    assert clock.buffer.eq(1).all(), "reading leaves no dirty lines in the cache"


def test_the_cuda_clock_sleeps_longer_than_python_launches(host):
    """A call whose launch outlasts the sleep is measured again; one that waits for the GPU itself says so."""
    cuda = FakeCuda()
    clock = CudaClock("cpu", cuda, flush_bytes=0)

    def slow_to_launch():
        host[0] += 0.01

    assert clock.measure(slow_to_launch).queued and len(cuda.sleeps) == 2
    assert cuda.sleeps[1] >= 0.01 * 1.98e9 and clock.measure(slow_to_launch).queued and len(cuda.sleeps) == 3

    def waits():
        host[0] += 1.0

    sample = clock.measure(waits)
    assert not sample.queued and sample.host == pytest.approx(1.0)


def test_quantiles():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (spread.p20, spread.p50, spread.p80, spread.samples) == (2.0, 3.5, 5.0, 6)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


class Order:
    """A clock that only writes down who ran."""

    def __init__(self):
        self.ran = []

    def measure(self, call):
        self.ran.append(call())
        return Sample(0.0)


def test_rounds_are_interleaved_and_start_with_another_one_each():
    clock = Order()
    contenders = {name: Contender(lambda _, n=name: n) for name in "abc"}
    race(contenders, {"a": 3, "b": 3, "c": 1}, clock)
    assert "".join(clock.ran) == "abc" + "ba" + "ab"
    assert [len(c.samples) for c in contenders.values()] == [3, 3, 1]


def test_prepare_runs_before_every_call_and_is_not_timed():
    log = []

    class Clock:
        def measure(self, call):
            log.append("begin")
            call()
            return Sample(0.0)

    contender = Contender(lambda state: log.append(state), prepare=lambda: log.append("prepare") or "state")
    race({"a": contender}, {"a": 2}, Clock())
    assert log == ["prepare", "begin", "state"] * 2


def test_an_interrupt_keeps_the_samples_that_were_taken():
    samples = iter([Sample(1.0), Sample(2.0)])

    class Clock:
        def measure(self, call):
            try:
                return next(samples)
            except StopIteration:
                raise KeyboardInterrupt from None

    contenders = {name: Contender(lambda _: None) for name in "ab"}
    with pytest.raises(KeyboardInterrupt):
        race(contenders, {"a": 5, "b": 5}, Clock())
    assert [c.samples for c in contenders.values()] == [[Sample(1.0)], [Sample(2.0)]]


def test_rounds_go_to_ours_and_to_the_fastest():
    counts = rounds_for({"ours": 0.1, "fast": 0.1, "slow": 0.3, "hopeless": 5.0}, 4.0, 9, frozenset({"ours"}))
    assert counts["ours"] == counts["fast"] == 9
    assert 0 < counts["slow"] < 9
    assert counts["hopeless"] == 0


def test_a_slow_one_of_ours_still_runs_in_all_rounds():
    counts = rounds_for({"ours": 1.0, "fast": 0.01}, 100.0, 9, frozenset({"ours"}))
    assert counts["ours"] == 9


def test_calls_race_after_a_run_that_is_not_counted():
    ran = []
    found = race_calls({name: lambda n=name: ran.append(n) for name in "ab"}, rounds=4)
    assert ran.count("a") == ran.count("b") == 5 and ran[:2] == ["a", "b"]
    assert {name: spread.samples for name, spread in found.items()} == {"a": 4, "b": 4}
    assert all(0 <= s.p20 <= s.p50 <= s.p80 for s in found.values())


def test_no_round_begins_when_the_time_is_over_but_the_fewest():
    contenders = {name: Contender(lambda _: None) for name in "ab"}
    race(contenders, {"a": 9, "b": 2}, Order(), until=0.0)
    assert [len(c.samples) for c in contenders.values()] == [3, 2]
