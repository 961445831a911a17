"""What a call costs beside its kernel, as pytest-benchmark measures it; nothing here depends on a time."""

import pytest
import torch

from vdcore_bench.suites import overhead

pytestmark = pytest.mark.benchmark(max_time=0.1)
WAYS = [(op, mode) for op in overhead.OPS for mode in ("fwd", "fwd+bwd")]


@pytest.mark.parametrize(("op", "mode"), WAYS)
def test_overhead_of_a_call(benchmark, op, mode):
    ours = next(iter(overhead.ways(overhead.tiny_job(op, mode))))
    with torch.set_grad_enabled(mode != "fwd"):
        benchmark(ours.call)


@pytest.mark.parametrize("op", ["temporal_attention"])
def test_overhead_of_torch_attention(benchmark, op):
    bare = next(way for way in overhead.ways(overhead.tiny_job(op)) if way.variant == "bare call")
    with torch.no_grad():
        benchmark(bare.call)


@pytest.mark.parametrize("op", overhead.OPS)
def test_every_way_is_a_row(op):
    rows = list(overhead.measure(overhead.tiny_job(op), rounds=3))
    assert {row.metric for row in rows} == {"overhead"} and all(row.p50 > 0 for row in rows)
    assert [row.variant for row in rows[:2]] == ["auto", "kernel alone"]
    assert any(not row.provider.startswith("vdcore") for row in rows)
