"""A baseline of the user's own, as docs/benchmarks.md describes it."""

import sys
from pathlib import Path

import pytest
import torch
from small import tiny_job
from test_peers import judged

from vdcore_bench.measure.journal import load
from vdcore_bench.peers import from_user

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_the_example_is_right_and_says_what_it_does_not_run(in_root, mode):
    peer = from_user("examples.peer:addcmul")
    job = tiny_job("modulate", mode=mode)
    assert peer.why_not(job) is None and "alone" in peer.why_not(tiny_job("gate_residual"))
    ((variant, make),) = peer.variants(job).items()
    assert variant == "" and judged(job, make()) < 2
    assert judged(job, make(), lambda y: y * 1.01) > 2


def test_it_runs_beside_the_built_in_ones(in_root, tmp_path, invoke):
    names = ("--op", "modulate", "--workload", "animatediff-level3", "--dtype", "float32")
    invoke("bench", *names, "--peer", "examples.peer:addcmul,eager", "--seconds", "0.05", "--out", tmp_path)
    timed = {row.provider: row for row in load(str(tmp_path)) if row.status == "ok"}
    assert set(timed) >= {"examples.peer:addcmul", "eager", "copy"}
    assert timed["examples.peer:addcmul"].error_ratio < 2


def test_several_variants_and_wrong_answers(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def both(job): return {'a': torch.nn.functional.gelu, 'b': torch.relu}\n"
        "def neither(job): return 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    job = tiny_job("modulate")
    made = from_user("mine:both").variants(job)
    assert [make() for make in made.values()] == [torch.nn.functional.gelu, torch.relu] and list(made) == ["a", "b"]
    with pytest.raises(TypeError, match="must return a function, a dict of functions or a reason, got 5"):
        from_user("mine:neither").variants(job)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("no_such_module:f", "expected module:function, and importing 'no_such_module' failed"),
        ("examples.peer:no_such", "expected module:function, and examples.peer has no function 'no_such'"),
        (":f", "expected module:function"),
    ],
)
def test_a_wrong_name_ends_with_2_and_what_was_expected(in_root, spec, expected, invoke):
    text = invoke("bench", "--op", "modulate", "--peer", spec, code=2)
    assert expected in " ".join(text.replace("│", "").split())
