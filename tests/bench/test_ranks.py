"""``vdcore profile --ranks``: rows and their table, memory that falls as one over the ranks, options."""

import json

import pytest

from vdcore.parallel.world import run_ranks
from vdcore_bench.measure.journal import FILE, Journal, Watch, parse
from vdcore_bench.report import results
from vdcore_bench.suites import ranks
from vdcore_bench.suites.models.vdit import ModelPoint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "two"), "not numbers"),
        (("--ranks", "2", "--model", "vdit-huge"), "known are vdit-factorized"),
        (("--ranks", "2", "--model", "vdit-full", "--plan", "switch"), "known are heads, halo, ring"),
        (("--ranks", "2", "--mode", "both"), "known are"),
    ],
)
def test_wrong_options_end_with_what_is_known(invoke, arguments, words):
    assert words in " ".join(invoke("profile", *arguments, code=2).replace("│", " ").split())


def test_plans_are_the_models():
    def plan(variant, count):
        return ranks.plan_of(ModelPoint(variant, "vdcore", 16), count, None)

    assert [plan("vdit-full", n) for n in (1, 2, 4)] == ["-", "heads", "ring"]  # of 6 heads
    assert plan("vdit-windowed", 4) == "halo"  # no more than a ring, in fewer messages, and not all frames at once
    assert plan("vdit-factorized", 4) == plan("vdit-gated", 4) == "switch"


@pytest.mark.slow
def test_rows_and_table(tmp_path):
    journal = Journal(tmp_path / FILE)
    settings = ranks.Settings(ranks=(2,), frames=(5,), link=10e9)
    ranks.run(("vdit-factorized",), settings, journal, Watch())
    journal.close()
    rows = parse((tmp_path / FILE).read_text())
    found = {(row.shape["ranks"], row.metric): row for row in rows}
    assert set(found) == {*((n, m) for n in (1, 2) for m in ("sent", "memory", "time")), (2, "predicted")}
    assert found[1, "sent"].p50 == 0
    # Forward and backward of two pairs, each there and back: the rank with 3 of 5 frames sends half of them there, and
    # what it has of the other's 2 back.
    assert found[2, "sent"].p50 == 2 * 2 * (3 * 128 + 2 * 128) * 384 * 4
    expected = found[1, "time"].p50 / 2 + found[2, "sent"].p50 / 10e9
    assert found[2, "predicted"].p50 == pytest.approx(expected) and found[2, "predicted"].status == "predicted"
    assert json.dumps(results.ranks_table(rows).rows).count("vdit-factorized") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "plan", "spare"),
    [
        ("vdit-factorized", None, 0.15),
        ("vdit-gated", None, 0.15),
        ("vdit-full", "ring", 0.25),
        ("vdit-windowed", "ring", 0.25),
    ],
)
def test_memory_falls_as_one_over_the_ranks(variant, plan, spare):
    """Activations of forward and backward, which are all but a few per cent of what is counted."""
    point = ModelPoint(variant, "vdcore", 16, "fwd+bwd")
    alone, shared = (max(f.peak for f in run_ranks(ranks.work, n, point, plan)) for n in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=spare)
