"""The command line, in processes of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from vdcore.bench.results import load

from vdcore.cli.commands import parse_bytes

VDCORE = [sys.executable, "-m", "vdcore.cli"]


def vdcore(*arguments, code=0, **kwargs):
    done = subprocess.run([*VDCORE, *arguments], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
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
def test_unknown_names_end_with_2_and_the_known_ones(arguments, expected):
    assert expected in vdcore(*arguments, code=2).stderr


SMALL = ("--op", "gate_residual", "--workload", "animatediff-level3", "--seconds", "0.05", "--peer", "eager")


def test_a_benchmark_leaves_rows_plots_and_a_report(tmp_path):
    text = vdcore("bench", *SMALL, "--dtype", "float32", "--out", tmp_path).stdout
    assert "gate_residual" in text and "eager" in text
    rows = load(str(tmp_path))
    assert {row.provider for row in rows if row.status == "ok"} >= {"eager", "copy"}
    assert any(row.provider.startswith("vdcore") and row.status == "ok" for row in rows)
    assert all(row.allocator.startswith("glibc, thresholds raised") for row in rows if sys.platform == "linux")
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "operators.png", "report.html"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_job_and_point_for_one_is_a_row(tmp_path):
    vdcore("bench", "--device", "cuda", "--op", "temporal_attention", "--out", tmp_path / "bench")
    vdcore("profile", "--device", "cuda", "--frames", "8,16", "--out", tmp_path / "profile")
    for folder in ("bench", "profile"):
        rows = load(str(tmp_path / folder))
        assert {(row.status, row.reason) for row in rows} == {("skipped", "no GPU is visible to torch")}


def test_two_results_are_compared(tmp_path):
    for name in "ab":
        vdcore("bench", *SMALL, "--dtype", "float32", "--out", tmp_path / name)
    text = vdcore("bench", "--compare", tmp_path / "a", tmp_path / "b").stdout
    assert "B / A" in text and "gate_residual, animatediff-level3, float32, fwd" in text and "drift" in text


def test_a_profile_leaves_rows_plots_and_a_report(tmp_path):
    arguments = ("--frames", "2,128", "--attention", "naive,vdcore", "--memory-limit", "64MiB", "--time-limit", "0.2")
    text = vdcore("profile", *arguments, "--out", tmp_path).stdout
    assert "~" in text and "full 3D" in text
    assert {row.status for row in load(str(tmp_path))} == {"ok", "predicted"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "profile.png", "report.html"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_keeps_rows_and_writes_the_report(tmp_path):
    arguments = ("bench", "--op", "gate_residual,modulate", "--seconds", "60", "--rounds", "100000", "--out", tmp_path)
    running = subprocess.Popen(
        [*VDCORE, *arguments],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which the tests may be, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    results = tmp_path / "results.jsonl"
    while not (results.exists() and results.read_text().strip()):
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130 and "interrupted" in errors
    assert (tmp_path / "report.html").exists() and load(str(tmp_path))


def test_sizes():
    assert parse_bytes("", "8GiB") == 8 * 2**30
    assert parse_bytes("", "1.5 mib") == 3 * 2**19
    assert parse_bytes("", "2GB") == parse_bytes("", "2e9") == 2 * 10**9
