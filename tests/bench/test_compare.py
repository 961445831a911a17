"""Two results beside each other: what is a change, and what is noise."""

import pytest
from small import row

from vdcore_bench.report import compare


def verdicts(a, b):
    return [change.verdict for change in compare.compare(a, b).changes]


def test_overlapping_intervals_are_noise():
    assert verdicts([row(p50=1.0)], [row(p50=1.03)]) == ["noise"]


def test_intervals_apart_are_a_change():
    assert verdicts([row(p50=1.0)], [row(p50=1.5)]) == ["slower"]
    assert verdicts([row(p50=1.0)], [row(p50=0.7)]) == ["faster"]
    assert verdicts([row(metric="memory", p50=1.0)], [row(metric="memory", p50=2.0)]) == ["more"]


def test_a_change_that_the_peers_also_show_is_the_machine():
    a = [row(p50=1.0), row("naive", 1.0), row("sdpa[flash]", 1.0)]
    b = [row(p50=1.2), row("naive", 1.25), row("sdpa[flash]", 1.25)]
    found = compare.compare(a, b)
    assert found.drift == pytest.approx(1.25)
    assert found.changes[0].verdict == "noise"
    b[0] = row(p50=1.4)
    assert verdicts(a, b)[0] == "slower"


def test_only_the_same_measurement_is_compared():
    a, b = [row(), row(dtype="bfloat16")], [row(), row(threads=7)]
    found = compare.compare(a, b)
    assert len(found.changes) == len(found.only_a) == len(found.only_b) == 1
    assert "without a counterpart: 1 rows of A, 1 rows of B" in found.summary()


def test_a_provider_that_stopped_running_is_named():
    assert verdicts([row()], [row(status="failed", p50=None)]) == ["ok -> failed"]


def test_another_machine_is_said():
    other = row(versions={"cpu": "another processor", "torch": "2"})
    assert compare.compare([row()], [other]).notes == ["cpu differs: A has a processor; B has another processor"]


def test_the_summary_has_the_geometric_mean():
    a = [row(p50=1.0), row(p50=1.0, dtype="bfloat16")]
    b = [row(p50=2.0), row(p50=0.5, dtype="bfloat16")]
    assert "vdcore's times, B over A, geometric mean of 2: 1.000" in compare.compare(a, b).summary()
