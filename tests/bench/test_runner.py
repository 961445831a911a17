"""The runner: every provider a row, measured or with its reason, whatever happens."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import tiny_job

from vdcore_bench.measure.journal import FILE, Journal, Watch, parse
from vdcore_bench.measure.timing import Contender, Sample
from vdcore_bench.peers import Peer
from vdcore_bench.report import summary
from vdcore_bench.suites import runner


class FakeClock:
    """Every call takes as long as it is told; the calls are really made."""

    def __init__(self, seconds=1e-3):
        self.seconds = seconds

    def measure(self, call):
        call()
        return Sample(self.seconds)


QUICK = runner.Settings(seconds=0.1, slow_start=False)


def run(tmp_path, job, settings=QUICK, clock=None):
    journal = Journal(tmp_path / FILE)
    rows = runner.run_job(job, settings, journal, Watch(), clock or FakeClock())
    journal.close()
    assert parse((tmp_path / FILE).read_text()) == rows
    return rows


@pytest.fixture
def few_peers(monkeypatch):
    """naive, and one that every test fills in."""

    def use(*peers):
        naive = next(peer for peer in runner.PEERS if peer.name == "naive")
        monkeypatch.setattr(runner, "PEERS", [naive, *peers])

    use()
    return use


def peer(name, function, **kwargs):
    return Peer(name, ("temporal_attention",), lambda job: {"only": lambda: function}, **kwargs)


def test_a_job_is_measured_judged_and_described(tmp_path, few_peers):
    rows = run(tmp_path, tiny_job("temporal_attention"))
    ours = next(r for r in rows if r.variant == "auto")
    assert ours.provider == "vdcore[cpu]" and ours.status == "ok"
    assert ours.p50 == 1e-3 and ours.samples >= 3
    assert 0 <= ours.error_ratio <= 1
    assert ours.versions["torch"] == torch.__version__ and ours.threads == torch.get_num_threads()
    assert ours.scaling == "frames 30 -> 5, tokens 3600 -> 6, heads 16 -> 4"
    assert {r.provider for r in rows} >= {"naive", "copy", "vdcore[triton]", "vdcore[cuda]"}
    assert all(r.reason for r in rows if r.status != "ok")


def test_a_peer_that_raises_is_a_failed_row(tmp_path, few_peers):
    def broken(**kwargs):
        raise RuntimeError("no kernel image\nand more lines")

    few_peers(peer("broken", broken))
    rows = run(tmp_path, tiny_job("temporal_attention"))
    failed = next(r for r in rows if r.provider == "broken")
    assert (failed.status, failed.reason, failed.p50) == ("failed", "RuntimeError: no kernel image", None)
    assert any(r.provider == "naive" and r.status == "ok" for r in rows)


def test_a_peer_that_cannot_be_made_is_a_failed_row(tmp_path, few_peers):
    def variants(job):
        raise ImportError("libcudart.so is missing")

    few_peers(Peer("absent", ("temporal_attention",), variants))
    rows = run(tmp_path, tiny_job("temporal_attention"))
    assert next(r for r in rows if r.provider == "absent").reason == "ImportError: libcudart.so is missing"


def test_a_wrong_peer_is_measured_and_its_error_shown(tmp_path, few_peers):
    few_peers(peer("wrong", lambda q, **kwargs: torch.zeros_like(q.unbind(3)[0])))
    rows = run(tmp_path, tiny_job("temporal_attention"))
    wrong = next(r for r in rows if r.provider == "wrong")
    assert wrong.status == "ok" and wrong.error_ratio > 100


def test_what_does_not_fit_is_predicted(tmp_path, few_peers):
    few_peers(peer("greedy", lambda **kwargs: pytest.fail("it must not run"), workspace=lambda job: 3 * 2**30))
    rows = run(tmp_path, tiny_job("temporal_attention"), replace(QUICK, memory=2**30))
    greedy = next(r for r in rows if r.provider == "greedy")
    assert (greedy.status, greedy.metric, greedy.unit) == ("predicted", "memory", "bytes")
    assert greedy.p50 >= 3 * 2**30 and "needs 3 GiB, the limit is 1 GiB" in greedy.reason


def test_a_job_that_does_not_fit_is_predicted_whole(tmp_path):
    (only,) = run(tmp_path, tiny_job("temporal_attention"), replace(QUICK, memory=10))
    assert only.provider == "all" and only.status == "predicted"


def test_an_interrupt_leaves_what_was_measured_in_the_file(tmp_path, few_peers):
    count = itertools.count()

    class Interrupted(FakeClock):
        def measure(self, call):
            if next(count) == 22:
                raise KeyboardInterrupt
            return super().measure(call)

    journal = Journal(tmp_path / FILE)
    with pytest.raises(KeyboardInterrupt):
        runner.run_jobs([tiny_job("temporal_attention")], QUICK, journal, clock=Interrupted())
    journal.close()
    rows = parse((tmp_path / FILE).read_text())
    assert any(r.status == "ok" and r.provider == "vdcore[cpu]" for r in rows)


class Times:
    """A call returns its name, and takes as long as ``seconds`` says."""

    def __init__(self):
        self.seconds = {"ours": 1.0, "copy": 0.5, "fast": 2.0, "near": 3.9, "far": 4.1, "compiled": 3.0}
        self.left = 10**9  # calls, until there is an interrupt

    def measure(self, call):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return Sample(self.seconds[call()])


@pytest.fixture
def contest(monkeypatch, tmp_path):
    """Runs a job of contenders with these times, with compiled peers or without; returns the rows that came."""

    def candidates(provider, **variants):
        return [
            runner.Candidate(provider, variant, contender=Contender(lambda _, name=name: name))
            for name, variant in variants.items()
        ]

    def variants(peer, job, compiled):
        found = candidates("peer", fast="fast", near="near", far="far", compiled="it, compiled")
        return found if compiled else found[:-1]

    monkeypatch.setattr(runner, "_ours", lambda *_: candidates("vdcore[cpu]", ours="auto"))
    monkeypatch.setattr(runner, "_copies", lambda _: candidates("copy", copy="existing memory"))
    monkeypatch.setattr(runner, "_variants", variants)
    monkeypatch.setattr(runner, "PEERS", [peer("peer", None)])
    journal, clock = Journal(tmp_path / FILE), Times()

    def run(compiled):
        begin = len(journal.rows)
        runner.run_jobs([tiny_job("temporal_attention")], replace(QUICK, compiled=compiled), journal, clock=clock)
        return journal.rows[begin:]

    yield SimpleNamespace(run=run, clock=clock, journal=journal)
    journal.close()


def test_compiled_peers_join_in_a_race_of_their_own(contest):
    """Ours, the copy and who is near the fastest run again beside them, and only these are compared."""
    first = contest.run(compiled=False)
    assert [row.variant for row in first] == ["auto", "existing memory", "fast", "near", "far"]
    for name in ("ours", "fast", "near", "compiled"):
        contest.clock.seconds[name] *= 10  # the machine is slower now
    second = contest.run(compiled=True)
    assert [row.variant for row in second] == ["it, compiled", "auto", "existing memory", "fast", "near"]
    (line,) = summary.lines(contest.journal.rows)
    assert (line.ours.p50, line.copy.p50, line.best.variant, line.speedup) == (10.0, 0.5, "fast", 2.0)
    assert [peer.variant for peer in line.peers] == ["far", "fast", "it, compiled", "near"]
    assert contest.run(compiled=True) == [], "nobody is new"


def test_an_interrupted_race_replaces_nothing(contest):
    contest.run(compiled=False)
    (before,) = summary.lines(contest.journal.rows)
    contest.clock.left = 8  # in the second race's first round
    with pytest.raises(KeyboardInterrupt):
        contest.run(compiled=True)
    (after,) = summary.lines(contest.journal.rows)
    assert (after.ours, after.peers) == (before.ours, before.peers)


def test_peers_that_had_no_time_left_are_rows_and_ours_is_measured(tmp_path, few_peers):
    few_peers(peer("late", lambda **kwargs: pytest.fail("it must not run")))
    rows = run(tmp_path, tiny_job("temporal_attention"), replace(QUICK, each=-1.0))
    assert [(r.status, r.reason.startswith(runner.LATE)) for r in rows if r.provider == "late"] == [("skipped", True)]
    assert next(r for r in rows if r.variant == "auto").status == "ok"


def test_an_interrupted_job_is_shown(tmp_path, few_peers):
    shown = []

    class Shown(Watch):
        def done(self, rows):
            shown.extend(rows)

    few_peers(peer("impatient", interrupt))
    with pytest.raises(KeyboardInterrupt):
        runner.run_jobs([tiny_job("temporal_attention")], QUICK, journal := Journal(tmp_path / FILE), Shown())
    assert shown == journal.rows != []


def interrupt(**kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("op", ["temporal_attention", "modulate", "video_attention"])
def test_modes(tmp_path, few_peers, mode, op):
    rows = run(tmp_path, tiny_job(op, mode=mode))
    ours = next(r for r in rows if r.variant == "auto")
    assert ours.mode == mode and ours.status == "ok" and ours.error_ratio <= 1


def test_on_a_gpu_that_is_not_there_a_job_is_a_skipped_row(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    journal = Journal(tmp_path / FILE)
    runner.run_jobs([replace(tiny_job("temporal_attention"), device="cuda")], QUICK, journal)
    journal.close()
    (only,) = journal.rows
    assert (only.status, only.reason) == ("skipped", "no GPU is visible to torch")


def test_jobs_that_had_no_time_left_are_rows(tmp_path):
    journal = Journal(tmp_path / FILE)
    runner.run_jobs([tiny_job("temporal_attention")], replace(QUICK, until=0.0), journal)
    journal.close()
    (only,) = journal.rows
    assert only.status == "skipped" and "the time of the run was over" in only.reason


def test_peers_can_be_chosen():
    settings = runner.Settings(peers=frozenset({"sdpa", "vdcore"}))
    assert settings.wants("sdpa[flash]") and settings.wants("vdcore[cpu]") and not settings.wants("naive")


class WarmClock(FakeClock):
    """Counts what it measures, and says how long Python took."""

    measured = 0

    def measure(self, call):
        self.measured += 1
        call()
        return Sample(self.seconds, host=3e-4, queued=self.measured > 2)


def test_a_cold_first_call_on_a_gpu_is_no_estimate(monkeypatch):
    """It is plans, modules and compilers; two calls after it are the estimate, and it is no one's sample."""
    seconds = iter(range(100))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(seconds)))
    job = SimpleNamespace(device="cuda", mode="fwd")
    calls = SimpleNamespace(job=job, once=lambda f: (f(), {}), contender=lambda f: Contender(lambda _: f()), dout=[])
    judge = SimpleNamespace(ratio=lambda *_: 0.5, note="")
    for device, measured, estimate in (("cuda", 2, 1e-3), ("cpu", 0, 1.0)):
        job.device, clock = device, WarmClock()
        c = runner.Candidate("sdpa[cudnn]", function=lambda: [])
        runner._warm_up(c, calls, judge, clock, 0.5)
        assert (c.status, c.contender.estimate, clock.measured) == ("ok", estimate, measured)


def test_rows_have_python_s_time_apart_and_say_where_it_is_in_theirs(tmp_path, few_peers):
    rows = [row for row in run(tmp_path, tiny_job("temporal_attention"), clock=WarmClock()) if row.status == "ok"]
    assert all(row.host == 3e-4 and row.p50 == 1e-3 for row in rows)
    assert not any(runner.UNQUEUED in row.reason for row in rows)


def test_a_sample_that_was_not_queued_is_in_the_reason(tmp_path, few_peers):
    class Late(FakeClock):
        def measure(self, call):
            call()
            return Sample(self.seconds, host=0.2, queued=False)

    rows = [row for row in run(tmp_path, tiny_job("temporal_attention"), clock=Late()) if row.status == "ok"]
    assert rows and all(runner.UNQUEUED in row.reason for row in rows)
