"""Every suite runs by its name; limits that nothing fits keep these runs short."""

import pytest

from vdcore_bench.measure.journal import FILE, Journal, Watch
from vdcore_bench.suites import SUITES, Options, find

TIGHT = {"memory_limit": 1}


@pytest.mark.parametrize("name", SUITES)
def test_it_reads_options_that_there_are(name):
    assert set(Options.__dataclass_fields__) >= find(name).TAKES and callable(find(name).run)


@pytest.mark.parametrize(
    ("name", "options", "ops"),
    [
        ("operators", {"ops": ("modulate",), "workloads": ("latte-1-512",)}, {"modulate"}),
        ("memory", {"modes": ("fwd", "fwd+bwd")}, {"video_attention", "spatial + temporal"}),
        ("models", {"models": ("vdit_block", "vdit-windowed")}, {"vdit_block", "vdit"}),
    ],
)
def test_what_does_not_fit_is_predicted(name, options, ops, tmp_path):
    journal = Journal(tmp_path / FILE)
    find(name).run(Options(**options, **TIGHT), journal, Watch())
    assert {row.op for row in journal.rows} == ops and {row.status for row in journal.rows} == {"predicted"}
    assert {row.mode for row in journal.rows} >= set(options.get("modes", ["fwd"]))


def test_the_suites_that_know_no_limit_end_with_their_time(tmp_path):
    for name in ("masks", "overhead"):
        journal = Journal(tmp_path / name / FILE)
        find(name).run(Options(until=0.0), journal, Watch())
        assert journal.rows and {row.status for row in journal.rows} == {"skipped"}
