"""Every suite runs by its name; limits that nothing fits keep these runs short."""

from dataclasses import replace

import pytest
import torch

from vdcore_bench.measure.journal import FILE, Journal, Watch
from vdcore_bench.suites import SUITES, Options, find, gradients, tangents

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
    for name in ("masks", "overhead", "tangents", "gradients"):
        journal = Journal(tmp_path / name / FILE)
        find(name).run(Options(until=0.0), journal, Watch())
        assert journal.rows and {row.status for row in journal.rows} == {"skipped"}


def test_errors_of_gradients():
    """Those of float32 are float32's; the exact ones are autograd's in float64."""
    rows = list(gradients.measure(gradients.job_of(700, torch.float32)))
    assert [row.provider.partition("[")[0] for row in rows] == ["vdcore", "sdpa"]
    assert all(1e-8 < row.p50 < 1e-5 and row.x == 700 for row in rows)
    ((tokens, dtype, *errors),) = gradients.cells(rows)
    assert (tokens, dtype) == ("700", "float32") and "-" not in errors
    q, k, v, dout = torch.randn(4, 2, 600, 16, dtype=torch.float64).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    by_autograd = torch.autograd.grad((q @ k.mT / 4).softmax(-1) @ v, leaves, dout)
    torch.testing.assert_close(gradients.exact(q.detach(), k.detach(), v.detach(), dout), list(by_autograd))


def test_tangents_stand_beside_forward():
    job = tangents.job_of(
        "video_attention", None, torch.float32, "cpu", replace(tangents.SHAPE, rows=2, columns=2, T=3)
    )
    rows = list(tangents.measure(job, rounds=3))
    assert [row.mode for row in rows] == list(tangents.MODES) and all(row.p50 > 0 for row in rows)
    ((name, _, forward, *ratios),) = tangents.cells(rows)
    assert "video_attention" in name and forward and len(ratios) == 2 and all(float(x) > 0 for x in ratios)
