"""Models against frames: providers agree, predictions are near, rows say what ran."""

from dataclasses import replace

import pytest
import torch

import vdcore
from vdcore_bench.measure.journal import Journal, Watch
from vdcore_bench.suites.memory import ATTENTIONS
from vdcore_bench.suites.models import vdit
from vdcore_bench.suites.sweep import Settings


@pytest.fixture
def small(monkeypatch):
    variants = {name: replace(given, width=24, heads=2) for name, given in vdit.VARIANTS.items()}
    monkeypatch.setattr(vdit, "VARIANTS", variants)
    monkeypatch.setattr(vdit, "SIZE", (4, 4, 4))


@pytest.mark.parametrize("variant", vdit.VARIANTS)
def test_providers_compute_the_same(variant, small):
    results = []
    for provider in ATTENTIONS:
        before = vdcore.calls()
        with vdit.attention_by(provider):
            model, _ = vdit._step(vdit.ModelPoint(variant, provider, 12), 12)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
            video = torch.randn(1, *vdit.SIZE[:1], 12, *vdit.SIZE[1:], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                results.append(model(video, torch.zeros(1)))
        ran = [op for op, *_ in vdcore.calls() - before if op.endswith("attention")]
        assert bool(ran) == (provider == "vdcore")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_predicted_rows(small, tmp_path):
    """A limit that nothing fits: all rows are predictions, naive full attention needs the most, and nothing is run."""
    journal = Journal(tmp_path / "results.jsonl")
    vdit.run(("vdit-full", "vdit-windowed"), Settings(frames=(2, 64), memory_limit=1), journal, Watch())
    assert len(journal.rows) == 2 * 3 * 2 * 2
    assert {row.status for row in journal.rows} == {"predicted"}
    need = {(r.workload, r.provider, r.x): r.p50 for r in journal.rows if r.metric == "memory"}
    assert need["vdit-full", "naive", 64] > 2 * need["vdit-full", "vdcore", 64]
    assert all("needs" in row.reason for row in journal.rows)


def test_measured_rows(small):
    rows = vdit.measure(vdit.ModelPoint("vdit-factorized", "vdcore", 4, "fwd+bwd"), Settings(), 0.0)
    assert [(row.metric, row.status) for row in rows] == [("memory", "ok"), ("time", "ok")]
    assert rows[1].p50 > 0
    assert rows[0].shape["T"] == 4


def test_flops_follow_the_mask(small):
    def flops(variant, provider, n):
        return vdit.ModelPoint(variant, provider, n).flops()

    assert flops("vdit-windowed", "naive", 64) == flops("vdit-full", "vdcore", 64)
    assert flops("vdit-windowed", "vdcore", 64) < flops("vdit-windowed", "naive", 64)
