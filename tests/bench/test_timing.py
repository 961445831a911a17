"""Clocks, quantiles, rounds and races, with clocks that a test sets."""

import pytest

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
        self.now, self.log = 0.0, []

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self):
        self.log.append("synchronize")


def test_the_cuda_clock_times_the_call_alone_and_in_seconds():
    cuda = FakeCuda()
    clock = CudaClock("cpu", cuda, flush_bytes=64)
    clock.buffer.fill_(7)

    def call():
        assert not clock.buffer.any(), "the cache is flushed before the call"
        cuda.log.append("call")
        cuda.now += 3.0

    assert clock.measure(call).seconds == pytest.approx(3e-3)
    assert cuda.log == ["synchronize", "record", "call", "record", "wait"]


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
