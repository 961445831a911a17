"""The profile: predictions that hold, points that do not fit, and processes that die."""

import os
from dataclasses import replace

import pytest
import torch

from vdcore_bench.measure.journal import FILE, Journal, Watch, parse
from vdcore_bench.measure.memory import PointError, in_process
from vdcore_bench.suites import Options, memory, sweep
from vdcore_bench.suites.memory import Point, count, measure_memory
from vdcore_bench.workloads import load

SETTINGS = sweep.Settings(frames=(24,), time_limit=60.0)


def points(pattern, attention, mode="fwd", frames=24):
    settings = replace(SETTINGS, frames=(frames,), attentions=(attention,), mode=mode)
    curves = memory.series(load()[memory.WORKLOAD], settings)
    return [curve[0] for curve in curves if pattern in memory.pattern_of(curve[0])]


MEASURED = [
    (pattern, attention, mode)
    for pattern in ("full 3D", "spatial + temporal", "window")
    for attention in ("naive", "sdpa", "vdcore")
    for mode in ("fwd", "fwd+bwd")
]


@pytest.mark.parametrize(("pattern", "attention", "mode"), MEASURED)
def test_predictions_are_within_a_factor_of_what_is_measured(pattern, attention, mode):
    """Beside 2 MiB, which threads and code may take."""
    for point in points(pattern, attention, mode):
        predicted, formula = count(point)
        measured = in_process(measure_memory, point, 8 * 2**30).bytes
        spare = 2 * 2**20
        assert (measured - spare) / 2 <= predicted <= 2 * (measured + spare), (point.variant, formula)


def test_naive_memory_grows_with_the_square_of_frames_and_ours_does_not():
    def need(attention, frames):
        (point,) = points("full 3D", attention, frames=frames)
        return count(point)[0]

    assert need("naive", 256) / need("naive", 128) == pytest.approx(4, rel=0.05)
    assert need("vdcore", 256) / need("vdcore", 128) == pytest.approx(2, rel=0.05)


def test_what_would_not_fit_is_predicted_and_says_what_it_would_need():
    (point,) = points("full 3D", "naive", frames=512)
    peak, clock = memory.measure(point, replace(SETTINGS, memory_limit=2**30), 1e11)
    assert peak.status == clock.status == "predicted"
    assert peak.p50 == count(point)[0] and clock.p50 == pytest.approx(point.flops() / 1e11)
    assert "the limit is 1 GiB" in peak.reason and "H N N e" in peak.reason


def test_what_would_take_too_long_is_predicted():
    (point,) = points("full 3D", "sdpa", frames=512)
    peak, clock = memory.measure(point, replace(SETTINGS, time_limit=0.1), 1e9)
    assert peak.status == clock.status == "predicted"
    assert "the limit is 100 ms" in clock.reason


def test_points_that_had_no_time_left_are_predicted():
    (point,) = points("full 3D", "sdpa")
    for row in memory.measure(point, replace(SETTINGS, until=0.0), 0.0):
        assert row.status == "predicted" and row.p50 > 0 and "the time of the run was over" in row.reason


def test_a_profile_leaves_a_row_for_every_point_in_its_file(tmp_path):
    journal = Journal(tmp_path / FILE)
    settings = {"frames": (2, 512), "attentions": ("naive", "vdcore"), "time_limit": 0.5}
    memory.profile((), Options(memory_limit=2**30), journal, Watch(), **settings)
    journal.close()
    rows = parse((tmp_path / FILE).read_text())
    assert len(rows) == 3 * 2 * 2 * 2  # patterns, attentions, frames, memory and time
    assert {row.status for row in rows} == {"ok", "predicted"}
    assert all(row.p50 > 0 for row in rows)
    assert {row.status for row in rows if row.provider == "naive" and row.x == 512 and "full" in row.case} == {
        "predicted"
    }


def _die():
    os.kill(os.getpid(), 9)


def _too_much():
    return torch.zeros(2**50)


def test_a_process_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(PointError, match="SIGKILL, out of memory"):
        in_process(_die)


def test_an_error_in_a_process_is_handed_on():
    with pytest.raises(PointError, match="RuntimeError"):
        in_process(_too_much)


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(PointError, match="longer than"):
        in_process(_sleep, timeout=0.5)


def _sleep():
    import time

    time.sleep(60)


def test_a_point_that_fails_is_a_row(monkeypatch):
    def fails(*args, **kwargs):
        raise PointError("its process ended with SIGKILL, out of memory")

    monkeypatch.setattr(sweep, "in_process", fails)
    (point,) = points("full 3D", "sdpa")
    assert isinstance(point, Point)
    for row in memory.measure(point, SETTINGS, 0.0):
        assert row.status == "failed" and "SIGKILL" in row.reason
