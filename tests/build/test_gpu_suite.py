"""The suite gpu, as far as it goes without a GPU: its jobs exist, a part that dies is a row, the tables are made."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vdcore_bench.jobs import JOBS
from vdcore_bench.measure.journal import PROFILE, Journal, Row
from vdcore_bench.report import results
from vdcore_bench.suites import gpu, operators
from vdcore_bench.workloads import Budget


def test_every_item_is_a_job():
    jobs, impossible = operators.jobs(gpu.ITEMS, "cuda", Budget(math.inf, 2**34))
    assert not impossible
    assert {job.op for job in jobs} == set(JOBS)
    assert all(job.memory() < 2**37 for job in jobs)


def test_the_contract_s_tests_exist():
    assert [path for path in gpu.TESTS if not path.is_file()] == []


BARE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('typer', 'rich', 'matplotlib', 'psutil', 'diffusers', 'av'):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
from vdcore_bench.suites import gpu
sys.argv[1:] = ['--out', sys.argv[1]]
gpu.main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize("command", [("-c", BARE), ("-m", "vdcore.cli", "bench", "gpu", "--out")], ids=["bare", "cli"])
def test_without_a_gpu_it_says_so(command, tmp_path):
    """Also where torch is all that is installed."""
    done = subprocess.run([sys.executable, *command, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "no GPU" in done.stderr, done.stderr


def test_unknown_parts_end_with_2_and_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "ceilings,weather"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no part weather; there are ceilings, correctness" in capsys.readouterr().err


def test_a_part_that_crashes_or_hangs_is_a_row():
    assert gpu._trouble("frames", None, 5).status == "failed"
    assert "ended with -11" in gpu._trouble("frames", -11, 5).reason
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu._wait(hung, 1) is None and hung.poll() is not None


def test_rows_of_parts_are_collected_and_shown(tmp_path):
    base = Row(op="ceiling", workload="4 GiB", provider="copy", mode="fwd", device="cuda")
    size = {"B": 1, "T": 8, "S": 256, "H": 16, "D": 64}
    curve = replace(base, op="video_attention", case=f"{PROFILE}dense", provider="naive", x=8.0, shape=size)
    rows = [
        replace(base, p50=2.0, bytes=8e9),
        replace(base, op="modulate", metric="error", error_ratio=1.5, status="failed", reason="error of x"),
        replace(curve, metric="memory", unit="bytes", p50=2.0**30),
        gpu._trouble("contract", None, 5),
    ]
    for i, row in enumerate(rows):
        journal = Journal(tmp_path / f"part-{i}-0.jsonl")
        journal.add([row])
        journal.close()
    found = gpu._collect(tmp_path, "part")
    assert found == rows and not list(tmp_path.glob("part-*"))
    text = "".join(table.plain() for table in results.measured("Operators", found))
    assert (
        "4 GB/s" in text and "1 of 1" in text and "1 GiB" in text and "more than 5 s" in text and "error of x" in text
    )
