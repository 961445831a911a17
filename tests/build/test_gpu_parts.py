"""The parts of the suite gpu in this process, without a GPU: what each of them must not get wrong on its one run."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import vdcore
from vdcore import cli
from vdcore.cli import doctor
from vdcore.cli.commands import app
from vdcore.ops import choose
from vdcore_bench.measure.journal import Journal
from vdcore_bench.suites import SUITES
from vdcore_bench.suites.gpu import child, conductor, parts, plan, sweep
from vdcore_bench.suites.gpu.child import Given


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    yield journal
    journal.close()


def test_nothing_on_the_path_hides_a_module_of_the_standard_library():
    """A `profile.py` beside the program once stood in the way of cProfile, and of all that torch compiles."""
    folders = [plan.ROOT, plan.ROOT / "bench", plan.ROOT / "kernels", plan.ROOT / "examples", plan.ROOT / "tests"]
    names = {path.stem for folder in folders for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert len(names) > 20 and not names & sys.stdlib_module_names


@pytest.mark.parametrize(("code", "count", "left"), [(0, 3, None), (1, 3, None), (4, 0, 4), (0, 0, 5), (2, 3, 2)])
def test_a_contract_that_ran_nothing_is_an_exit_code(code, count, left, tmp_path, journal, monkeypatch):
    """A file that was renamed once ended the part with 0 of 0 failed."""

    def run(arguments, plugins):
        plugins[0].pytest_collection_modifyitems([None] * count)
        return code

    monkeypatch.setattr(pytest, "main", run)
    given = Given("contract", tmp_path, dry=True)
    if left is None:
        return parts.contract(given, journal)
    with pytest.raises(SystemExit) as end:
        parts.contract(given, journal)
    assert end.value.code == left


@pytest.mark.parametrize(("name", "fused"), [("benchmarks", True), ("slow", False)])
def test_compiled_peers_run_where_there_is_something_to_fuse_and_last(name, fused, tmp_path, journal, monkeypatch):
    asked = []
    monkeypatch.setattr(parts, "run_jobs", lambda jobs, settings, _: asked.append((jobs[0].op, settings)))
    monkeypatch.setattr(Given, "device", "meta")
    monkeypatch.setattr(Given, "memory", 2**37)
    monkeypatch.setattr(child, "lost", lambda _: False)
    getattr(parts, name)(Given(name, tmp_path), journal)
    assert {op for op, _ in asked} >= (plan.FUSED if fused else {"video_attention"})
    for op, settings in asked:
        assert not settings.slow_start
        if fused:
            assert settings.compiled == (op in plan.FUSED)
            assert settings.peers == (None if op in plan.FUSED else plan.STRONGEST)
        else:
            assert op not in plan.FUSED and settings.compiled and settings.peers is None


def test_naive_attention_that_would_not_fit_is_a_row(tmp_path, journal, monkeypatch):
    """10 bytes of every pair of tokens: scores, probabilities, their gradients and one more."""
    monkeypatch.setattr(Given, "memory", 1000)
    monkeypatch.setattr(parts, "_measured", lambda row, call, device: [])
    parts.frames(Given("frames", tmp_path, dry=True), journal)
    assert [(row.provider, row.status, row.p50) for row in journal.rows] == [
        ("naive", "predicted", 10.0 * 2 * (T * 16) ** 2) for T in parts.DRY_FRAMES
    ]


def test_a_part_begins_no_step_in_its_last_seconds():
    """A part that is killed loses the step under way."""
    assert conductor.until(510) - time.monotonic() == pytest.approx(470, abs=5)
    assert conductor.until(60) - time.monotonic() == pytest.approx(30, abs=5)


@pytest.mark.parametrize(("shards", "threads"), [(8, "2"), (1, None)])
def test_shards_share_the_processor(shards, threads, tmp_path, monkeypatch):
    environments = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: environments.append(env))
    conductor.Child.start(Given("correctness", tmp_path, shards=shards))
    assert environments[0].get("OMP_NUM_THREADS") == threads and environments[0]["TRITON_INTERPRET"] == "0"


@pytest.mark.parametrize(
    ("code", "nvcc", "status", "said"),
    [(0, "/nvcc", "ok", ""), (0, None, "skipped", "no nvcc"), (2, "/nvcc", "failed", "ended with 2: no memory")],
)
def test_a_build_that_fails_is_a_row(code, nvcc, status, said, tmp_path, journal, monkeypatch):
    """Without the module every row of CUDA's would be skipped, and nobody would know why."""
    asked = []

    def run(command, env, **_):
        asked.append(env["VDCORE_CUDA"])
        return SimpleNamespace(returncode=code, stdout="", stderr="cicc\nno memory")

    monkeypatch.setattr(parts.subprocess, "run", run)
    monkeypatch.setattr(parts.shutil, "which", lambda _: nvcc)
    parts.build(Given("build", tmp_path), journal)
    assert asked == ["ON" if nvcc else "OFF"]
    assert journal.rows[-1].status == status and said in journal.rows[-1].reason


def test_forced_rows_reach_backward():
    """Autograd runs a GPU's backward on a thread of its own, where what is forced here does not hold."""
    pytest.importorskip("triton")
    from vdcore_kernels.core.launch import force, pick

    module, name = sweep._table("temporal_attention.backward.BACKWARD")
    table = getattr(module, name)
    with force(table[-1]):
        assert pick(table, "sm_90") is table[-1] and not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()
    with sweep.forced("temporal_attention.backward.BACKWARD", table[-1]):
        assert getattr(module, name)[0] is table[-1] and not torch._C._is_multithreading_enabled()
    assert getattr(importlib.import_module(module.__name__), name) is table


README = (plan.ROOT / "bench" / "results" / "README.md").read_text()


def commands():
    """What is to be typed, by bench/results/README.md: lines that are indented, and words between backticks."""
    lines = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    spans = re.findall(r"`([^`\n]+)`", README)
    return [
        shlex.split(text) for text in lines + spans if text.split()[0] in ("python", "vdcore", "make", "pytest", "pip")
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_results_page_exists(words):
    program, *rest = words
    options = {word for word in rest if word.startswith("--")}
    if rest[:2] == ["-m", "vdcore_bench.suites.gpu"]:
        given = importlib.import_module("vdcore_bench.suites.gpu.__main__")._parser().parse_args(rest[2:])
        assert set(given.only.split(",")) <= set(plan.PARTS)
    elif program == "vdcore":
        said = CliRunner().invoke(app, [rest[0], "--help"]).output if rest[0] != "doctor" else doctor_help()
        assert rest[0] in cli.COMMANDS and all(option in said for option in options)
        if rest[0] == "bench":
            assert rest[1].startswith("--") or rest[1] in SUITES
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (plan.ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pytest":
        assert (plan.ROOT / rest[0]).is_file()
    else:
        assert words[:2] == ["pip", "install"]


def doctor_help():
    found = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(found):
        doctor.main(["--help"])
    return found.getvalue()


def test_what_the_results_page_names_is_there():
    """Parts of the suite, operators, files, and what they hold."""
    named = set(re.findall(r"`([^`\n]+)`", README))
    first = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    rows = {name for cell in first for name in cell.split("`")[1::2]}
    assert rows - set(vdcore.__all__) == set(plan.PARTS) - {"selfcheck"} | {"--only"}
    assert {name for name in named if name.endswith("attention")} <= set(vdcore.__all__)
    files = [name for name in named if re.fullmatch(r"[\w/]+\.(py|cuh|jsonl|md)", name)]
    assert len(files) > 3 and all(list(plan.ROOT.glob(f"**/{name}")) for name in files)
    plans = next(plan.ROOT.glob("csrc/cuda/*/plan_sm90.cuh")).read_text()
    assert "kBlocks" in plans and "ORDER" in vars(choose)
    assert len(README.splitlines()) <= 60
