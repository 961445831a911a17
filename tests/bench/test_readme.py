"""The README's tables: made by the generator, and up to date."""

from pathlib import Path

import pytest
import torch
from small import row

import vdcore
from vdcore.ops.choose import BACKENDS
from vdcore.ops.operator import capture
from vdcore.testing.cases import cases_of
from vdcore_bench.measure.journal import MASKS, PROFILE
from vdcore_bench.report import readme

ROOT = Path(__file__).parents[2]


def marked(name):
    return f"before\n<!-- table:{name} -->\nold\n<!-- /table -->\nafter\n"


def test_the_operator_table_of_the_readme_is_up_to_date():
    """Run `vdcore bench --readme README.md` after adding an operator to a backend."""
    text = (ROOT / "README.md").read_text()
    if "<!-- table:operators -->" in text:
        assert readme.operators(ROOT) in text


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa"])
def test_backends_take_the_dtypes_that_the_table_says(backend):
    """Every operator of a backend, in every dtype: an objection to it, or none."""
    its = BACKENDS[backend]
    for op in its.operators:
        plain = cases_of(op, tag="plain")[0]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            call = capture(getattr(vdcore, op), **plain.inputs(dtype).args)
            said = its.why_not(call) or ""
            assert (f"it has no {dtype}" in said) == bool(its.dtypes and dtype not in its.dtypes), (op, dtype, said)


def test_the_operator_table_has_every_operator_and_backend():
    table = readme.operators(ROOT)
    assert "| `temporal_attention` | fwd + bwd |" in table
    assert table.splitlines()[0].count("|") == 7


def test_a_marked_table_is_replaced_and_nothing_else():
    filled = readme.fill(marked("operators"), ROOT)
    assert filled.startswith("before\n<!-- table:operators -->\n| operator |")
    assert filled.endswith("<!-- /table -->\nafter\n") and "old" not in filled
    assert readme.fill(filled, ROOT) == filled


def test_results_come_from_committed_rows(tmp_path):
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    rows = [row(p50=9.0, time="2020"), row(p50=2.0, time="2021"), row("naive", 5.0, time="2022", commit="abc123")]
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    table = readme.fill(marked("cpu"), tmp_path)
    assert "2.50x" in table and "a processor" in table and "abc123" in table
    assert "No results" in readme.fill(marked("gpu"), tmp_path)


def test_machines_stand_apart(tmp_path):
    """A peer's time on one is not held against ours on the other; the last measured comes first."""
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    rows = []
    for cpu, isa, ours, peer, time in (("old", "avx2", 1.0, 3.0, "2020"), ("new", "avx512", 2.0, 1.0, "2021")):
        versions = {"cpu": cpu, "isa": isa, "torch": "2"}
        rows += [row(p50=ours, time=time, versions=versions), row("naive", peer, time=time, versions=versions)]
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    table = readme.fill(marked("cpu"), tmp_path)
    assert table.index("new (avx512)") < table.index("0.50x") < table.index("old (avx2)") < table.index("3.00x")
    lost = readme.fill(marked("losses"), tmp_path)
    assert "- new (avx512): the best peer is faster in 1 of 1 jobs: " in lost
    assert "- old (avx2): the best peer is faster in 0 of 1 jobs.\n" in lost


def test_masks_of_two_machines_stand_in_two_tables(tmp_path):
    """Dense attention of one is not what masks of the other are relative to, even where processors have one name."""
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    rows = []
    for isa, dense, time in (("avx2", 1.0, "2020"), ("avx512", 10.0, "2021")):
        versions = {"cpu": "one name", "isa": isa, "torch": "2"}
        for case, p50 in (("dense", dense), ("causal", dense / 2)):
            rows.append(row("vdcore", p50, case=f"{MASKS}{case}", x=16, flops=1e9, time=time, versions=versions))
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    new, old = readme.fill(marked("masks"), tmp_path).split("one name (avx2)")
    assert "one name (avx512)" in new
    for table, dense, causal in ((new, "10 s", "5 s"), (old, "1 s", "500 ms")):
        assert table.count("| dense | 16 |") == table.count("| causal | 16 |") == 1
        assert f"| {dense} |" in table and f"| {causal} |" in table


def test_steps_have_a_table_of_their_own(tmp_path):
    """And what the other tables say of the machine is said by their own rows."""
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    of_step = {"op": "step", "workload": "Wan 1.3B step", "variant": "", "commit": "newer", "time": "2021"}
    rows = [row(commit="older", time="2020"), row("naive", 5.0, commit="older", time="2020")]
    rows += [row("diffusers", 3.0, **of_step), row("vdcore", 2.0, reason="as the host", **of_step)]
    rows += [row("diffusers", 1.0, metric="part: attention", **of_step)]
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    table = readme.fill(marked("steps"), tmp_path)
    assert "| Wan 1.3B step, float32 | vdcore | 2 s | 1.50x |" in table and "as the host" in table and "newer" in table
    assert "| 3 s | 1.00x | - | 100 % |" in table
    cpu = readme.fill(marked("cpu"), tmp_path)
    assert "2.50x" in cpu and "older" in cpu and "newer" not in cpu and "Wan" not in cpu


def test_unknown_tables_and_missing_ends_are_errors(tmp_path):
    with pytest.raises(ValueError, match="known are operators"):
        readme.fill(marked("weather"), tmp_path)
    with pytest.raises(ValueError, match="no <!-- /table -->"):
        readme.fill("<!-- table:cpu -->\n", tmp_path)


def model_row(provider, metric, p50, **kwargs):
    values = {"op": "vdit", "workload": "vdit-full", "case": f"{PROFILE}2 blocks", "variant": "", "metric": metric}
    return row(provider, p50, **values, **kwargs)


def test_models_against_frames_stand_beside_vdcore(tmp_path):
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    rows = [
        model_row(who, metric, p50 * n, x=n, status="predicted" if (who, n) == ("naive", 16) else "ok")
        for n in (8, 16)
        for who, metric, p50 in (
            ("naive", "memory", 3 * 2**20),
            ("naive", "time", 0.5),
            ("vdcore", "memory", 2**20),
            ("vdcore", "time", 0.25),
        )
    ]
    assert "No profile of a model" in readme.fill(marked("models"), tmp_path)
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    table = readme.fill(marked("models"), tmp_path)
    assert "| vdit-full | fwd | float32 | 8 | 8 MiB, 2 s | naive | 24 MiB | 4 s | 3.00x | 2.00x |" in table
    assert "| 16 | 16 MiB, 4 s | naive | ~48 MiB | ~8 s | ~3.00x | ~2.00x |" in table
    assert "No profile is committed" in readme.fill(marked("memory"), tmp_path)
