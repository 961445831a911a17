"""bench/gpu.py, as far as it goes without a GPU: its jobs exist, a part that dies is a row, the table is printed."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_item_is_a_job(gpu):
    jobs, impossible = gpu.suite.jobs(gpu.ITEMS, "cuda", gpu.workloads.Budget(math.inf, 2**34))
    assert not impossible
    assert {job.op for job in jobs} == set(gpu.suite.JOBS)
    assert all(job.memory() < 2**37 for job in jobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "no GPU" in done.stderr


def test_a_part_that_crashes_or_hangs_is_a_row(gpu, tmp_path):
    assert gpu._trouble("frames", None, 5).status == "failed"
    assert "ended with -11" in gpu._trouble("frames", -11, 5).reason
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu._wait(hung, 1) is None and hung.poll() is not None


def test_rows_of_parts_are_collected_and_printed(gpu, tmp_path, capsys):
    base = gpu.Row(op="ceiling", workload="4 GiB", provider="copy", mode="fwd", device="cuda")
    rows = [
        replace(base, p50=2.0, bytes=8e9),
        replace(base, op="modulate", metric="error", error_ratio=1.5, status="failed", reason="error of x"),
        replace(
            base,
            op="video_attention",
            case=f"{gpu.curves.PROFILE}dense",
            provider="naive",
            x=8.0,
            unit="bytes",
            p50=2.0**30,
        ),
        gpu._trouble("contract", None, 5),
    ]
    for i, row in enumerate(rows):
        journal = gpu.Journal(tmp_path / f"part-{i}-0.jsonl")
        journal.add([row])
        journal.close()
    found = gpu._collect(tmp_path, ["part"])
    assert found == rows and not list(tmp_path.glob("part-*"))
    gpu._print(found, 1.0)
    text = capsys.readouterr().out
    assert "4 GB/s" in text and "1 of 1 failed" in text and "1024.0 MiB" in text and "more than 5 s" in text
