"""The command line: in this process, and once in one of its own, where its memory is set up and signals reach it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from vdcore.cli.options import parse_bytes
from vdcore_bench.jobs import JOBS
from vdcore_bench.measure.journal import FILE, Journal, Watch, load
from vdcore_bench.suites import Options, everything, operators, runner
from vdcore_bench.workloads import Budget

VDCORE = [sys.executable, "-m", "vdcore.cli"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bench", "weather"), "operators, masks, memory, models, overhead, tangents, gradients, gpu"),
        (("bench", "masks", "--op", "modulate"), "the suite masks does not take it"),
        (("bench", "--only", "weather"), "ceilings, benchmarks, correctness"),
        (("bench", "--op", "attention"), "temporal_attention, video_attention"),
        (("bench", "--workload", "sora"), "latte-1-512, stdit3-720p-102f"),
        (("bench", "--peer", "naive,someone"), "sdpa[flash]"),
        (("bench", "--mode", "train"), "fwd, bwd, fwd+bwd"),
        (("bench", "--dtype", "fp8"), "float32, bfloat16, float16"),
        (("bench", "--device", "abacus"), "cpu, cuda"),
        (("bench", "--memory-limit", "lots"), "8GiB"),
        (("bench", "--compare", "no-such-file", "nor-this"), "neither a file"),
        (("profile", "--attention", "flash"), "naive, sdpa, vdcore"),
        (("profile", "--frames", "8,many"), "8,16,32"),
        (("profile", "--workload", "sora"), "latte-1-512"),
        (("profile", "--dtype", "fp8"), "float32"),
    ],
)
def test_unknown_names_end_with_2_and_the_known_ones(arguments, expected, invoke):
    assert expected in " ".join(invoke(*arguments, code=2).replace("│", "").split())


SMALL = ("--op", "gate_residual", "--workload", "animatediff-level3", "--seconds", "0.05", "--peer", "eager")


@pytest.fixture(scope="module")
def small(tmp_path_factory, invoke):
    """A folder with the results of a small benchmark, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    return out, invoke("bench", *SMALL, "--dtype", "float32", "--out", out)


def test_a_benchmark_leaves_rows_plots_and_a_report(small):
    out, text = small
    assert "gate_residual" in text and "eager" in text
    rows = load(str(out))
    assert {row.provider for row in rows if row.status == "ok"} >= {"eager", "copy"}
    assert any(row.provider.startswith("vdcore") and row.status == "ok" for row in rows)
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "operators.png", "report.html"}


def test_noise_is_said_before_the_numbers(small):
    out, text = small
    (said,) = (line for line in text.splitlines() if line.startswith("The machine was "))
    assert "copies of the same bytes differ by" in said
    page = (out / "report.html").read_text()
    assert f'<p class="note">{said}' in page and page.index(said) < page.index("<table")


def test_two_results_are_compared(small, tmp_path, invoke):
    (tmp_path / "b.jsonl").write_text((small[0] / "results.jsonl").read_text())
    text = invoke("bench", "--compare", small[0], tmp_path / "b.jsonl")
    assert "B / A" in text and "gate_residual, animatediff-level3, float32, fwd" in text and "drift" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_job_and_point_for_one_is_a_row(tmp_path, invoke):
    invoke("bench", "--device", "cuda", "--op", "temporal_attention", "--out", tmp_path / "bench")
    invoke("profile", "--device", "cuda", "--frames", "8,16", "--out", tmp_path / "profile")
    for folder in ("bench", "profile"):
        rows = load(str(tmp_path / folder))
        assert {(row.status, row.reason) for row in rows} == {("skipped", "no GPU is visible to torch")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize("suite", ["masks", "overhead", "tangents", "gradients"])
def test_without_a_gpu_suites_that_have_no_rows_for_it_say_so_and_touch_nothing(suite, tmp_path, invoke, capfd):
    said = invoke("bench", suite, "--device", "cuda", "--out", tmp_path / "out", code=1) + capfd.readouterr().err
    assert f"vdcore bench {suite}: cuda: no GPU is visible to torch" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    said = invoke("masks", "--model", "vdit-full", "--device", "cuda", "--out", tmp_path / "out", code=1)
    assert "vdcore masks: cuda: no GPU is visible to torch" in said + capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_the_default_set_is_rows_that_say_so(tmp_path):
    journal = Journal(tmp_path / FILE)
    everything.run(Options(device="cuda"), journal, Watch())
    assert {(row.status, row.reason) for row in journal.rows} == {("skipped", "no GPU is visible to torch")}


def test_a_further_run_adds_to_the_rows_of_a_folder(tmp_path, invoke):
    for op in ("modulate", "gate_residual"):
        invoke("bench", "--device", "cuda", "--op", op, "--out", tmp_path)
    assert {row.op for row in load(str(tmp_path))} == {"modulate", "gate_residual"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_a_run_into_the_folder_of_another_ends_with_2(tmp_path, invoke):
    journal = Journal(tmp_path / FILE)
    for command in (("bench", "--op", "modulate"), ("profile", "--frames", "8,16")):
        said = invoke(*command, "--device", "cuda", "--out", tmp_path, code=2)
        assert "--out" in said and "another run writes into it" in " ".join(said.replace("│", "").split())
    journal.close()
    assert not (tmp_path / FILE).read_text()


def test_a_profile_leaves_rows_plots_and_a_report(tmp_path, invoke):
    arguments = ("--frames", "2,128", "--attention", "naive", "--memory-limit", "64MiB", "--time-limit", "0.2")
    text = invoke("profile", *arguments, "--out", tmp_path)
    assert "~" in text and "full 3D" in text
    assert {row.status for row in load(str(tmp_path))} == {"ok", "predicted"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "profile.png", "report.html"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_keeps_rows_and_writes_the_report(tmp_path):
    arguments = ("--op", "modulate,gate_residual", "--mode", "fwd,bwd,fwd+bwd", "--peer", "eager")
    running = subprocess.Popen(
        [*VDCORE, "bench", *arguments, "--seconds", "0.1", "--out", tmp_path],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which the tests may be, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    results = tmp_path / "results.jsonl"
    while not (results.exists() and '"ok"' in results.read_text()):
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    text, errors = running.communicate(timeout=120)
    assert running.returncode == 130 and "interrupted" in errors
    assert "modulate" in text and "The machine was" in text
    assert (tmp_path / "report.html").exists()
    rows = load(str(tmp_path))
    assert all(row.allocator.startswith("glibc, thresholds raised") for row in rows if sys.platform == "linux")


def test_every_operator_is_measured_before_anything_is_compiled_and_the_clock_cuts_the_tail(
    tmp_path, invoke, monkeypatch
):
    """The default set with a budget of nothing and a run of no time: shapes are tiny, and all but breadth is cut."""
    monkeypatch.setattr(Budget, "of", lambda *_: Budget(1e6, 1e5))
    monkeypatch.setattr(everything, "SECONDS", -1.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("something was compiled"))
    text = invoke("bench", "--seconds", "0.01", "--rounds", "3", "--out", tmp_path)
    rows = load(str(tmp_path))
    ours = [row for row in rows if row.variant == "auto" and row.metric == "time"]
    assert [row.op for row in ours] == [item.op for item in operators.EVERY_OPERATOR]
    assert {row.op for row in ours} == set(JOBS)
    assert {row.status for row in ours} == {"ok"}
    for op in (row.op for row in ours):
        peers = {row.provider.partition("[")[0] for row in rows if row.op == op and row.status == "ok"}
        assert peers - {"vdcore", "vdcore, in parts", "copy"}, op
    late = [row for row in rows if row.reason.startswith(runner.LATE)]
    assert {row.op for row in late if row.provider == "compiled"} == {row.op for row in ours}
    assert {(row.op, row.dtype) for row in late if row.provider == "all"} >= {(row.op, "bfloat16") for row in ours}
    assert any(row.metric == "overhead" for row in late) and any(row.case.startswith("masks") for row in late)
    assert all(row.status == "predicted" for row in rows if row.case.startswith("profile"))
    assert text.index("Every operator") < text.index("The machine was") < text.index("Not measured")


def test_an_interrupt_while_peers_compile_keeps_what_was_measured_without_them(tmp_path, invoke, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    first, again = (replace(step, items=step.items[-1:]) for step in operators.FIRST)
    monkeypatch.setattr(operators, "FIRST", (first, again))
    monkeypatch.setattr(Budget, "of", lambda *_: Budget(1e6, 1e5))
    monkeypatch.setattr(torch, "compile", interrupt)
    text = invoke("bench", "--seconds", "0.01", "--rounds", "3", "--out", tmp_path, code=130)
    assert {row.provider for row in load(str(tmp_path)) if row.status == "ok"} >= {"vdcore[cpu]", "eager", "copy"}
    assert text.count("gate_residual") >= 2 and again.title in text and (tmp_path / "report.html").exists()


def test_sizes():
    assert parse_bytes("", "8GiB") == 8 * 2**30
    assert parse_bytes("", "1.5 mib") == 3 * 2**19
    assert parse_bytes("", "2GB") == parse_bytes("", "2e9") == 2 * 10**9
