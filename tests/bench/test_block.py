"""The block's benchmark: both forms compute the same, and the rows say what was run."""

from dataclasses import replace

import pytest
import torch

from vdcore_bench.measure.journal import Journal, Watch
from vdcore_bench.measure.memory import in_process
from vdcore_bench.suites import Options
from vdcore_bench.suites.models import block
from vdcore_bench.workloads import Budget, Shape

SMALL = Shape(B=2, T=3, rows=2, columns=4, H=2, G=2, D=16, L=5)


@pytest.mark.parametrize("mode", block.MODES)
def test_outputs_and_gradients(mode):
    ratios = block.judge(block.BlockJob(SMALL, SMALL, mode))
    assert set(ratios) == set(block.PLAIN)
    assert max(ratios.values()) <= 1


def test_a_wrong_block_is_noticed(monkeypatch):
    wrong = dict(block.PROVIDERS)
    wrong["vdcore", "auto"] = lambda given: block.eager(given) * 1.001
    monkeypatch.setattr(block, "PROVIDERS", wrong)
    assert block.judge(block.BlockJob(SMALL, SMALL))["vdcore", "auto"] > 1


def test_the_shape_is_latte_s():
    (whole,) = block.jobs(("fwd",), ("float32",), "cpu", Budget.unlimited())
    sizes = whole.shape.sizes()
    assert [sizes[x] for x in "BTSHDL"] == [1, 16, 1024, 16, 72, 120]
    cut = block.jobs(block.MODES, ("float32", "bfloat16"), "cpu", Budget(4e9, float("inf")))
    assert len(cut) == 4
    assert len({job.shape for job in cut}) == 1
    assert cut[0].flops() <= block.CALLS * 4e9
    assert (cut[0].shape.T, cut[0].shape.H, cut[0].shape.D, cut[0].shape.L) == (16, 16, 72, 120)


def test_rows(tmp_path, in_this_process):
    journal = Journal(tmp_path / "results.jsonl")
    jobs = [block.BlockJob(replace(SMALL, rows=4), SMALL, mode) for mode in block.MODES]
    options = Options(seconds=0.01, rounds=3, peers=frozenset({"eager[sdpa]"}))
    block.measure(jobs, options, journal, Watch())
    assert {(r.mode, r.provider, r.metric) for r in journal.rows} == {
        (mode, provider, metric)
        for mode in block.MODES
        for provider in ("vdcore", "eager[sdpa]")
        for metric in ("time", "memory")
    }
    assert all(r.op == "vdit_block" and r.status == "ok" for r in journal.rows)
    assert all(r.error_ratio <= 1 and r.p50 > 0 for r in journal.rows if r.metric == "time")
    assert all("tokens 16 -> 8" in r.scaling for r in journal.rows)
    assert [line[1] for line in block.cells(journal.rows)] == list(block.MODES)


def test_memory_is_that_of_a_fresh_process():
    assert in_process(block.measure_memory, block.BlockJob(SMALL, SMALL, "fwd+bwd"), "vdcore", "auto") > 0


def test_what_does_not_fit_says_what_it_needs(tmp_path):
    journal = Journal(tmp_path / "results.jsonl")
    job = block.BlockJob(SMALL, SMALL)
    block.measure([job], Options(memory_limit=1000), journal, Watch())
    (row,) = journal.rows
    assert (row.status, row.metric, row.p50) == ("predicted", "memory", job.need())
    assert "needs" in row.reason


@pytest.mark.parametrize("mode", block.MODES)
def test_flops_are_counted(mode):
    from torch.utils.flop_counter import FlopCounterMode

    job = block.BlockJob(SMALL, SMALL, mode)
    given = block.inputs(job)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = block.eager(given)
        if job.trains:
            out.backward(given.dout)
    assert abs(counter.get_total_flops() / job.flops() - 1) < 0.1
