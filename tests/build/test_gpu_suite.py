"""The suite gpu, as far as it goes without a GPU: its jobs exist, a part that dies is a row, the tables are made."""

import importlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vdcore.ops.choose import BACKENDS
from vdcore_bench.jobs import JOBS
from vdcore_bench.measure.journal import FILE, PROFILE, SWEEP, Journal, Row, parse
from vdcore_bench.report import results
from vdcore_bench.suites import gpu, operators
from vdcore_bench.suites.gpu import child, plan
from vdcore_bench.suites.gpu import conductor as conducting
from vdcore_bench.suites.gpu.child import Given, Steps
from vdcore_bench.workloads import Budget

main = importlib.import_module("vdcore_bench.suites.gpu.__main__").main


def test_every_item_is_a_job():
    jobs, impossible = operators.jobs(gpu.ITEMS, "cuda", Budget(math.inf, 2**34))
    assert not impossible
    assert {job.op for job in jobs} == set(JOBS)
    assert all(job.memory() < 2**37 for job in jobs)
    assert {item.op for item in plan.items(dry=True)} == set(JOBS)


def test_the_contract_s_tests_exist():
    assert len(gpu.tests()) > 3 and [path for path in gpu.tests() if not path.is_file()] == []


def test_parts_are_in_order_and_each_fits_into_nine_minutes():
    order = ["smoke", "ceilings", "benchmarks", "correctness", "contract", "slow"]
    assert [name for name in gpu.PARTS if name in order] == order
    assert all(part.seconds < 540 for part in gpu.PARTS.values())


def test_every_swept_table_is_there():
    pytest.importorskip("triton")
    from vdcore_bench.suites.gpu import sweep
    from vdcore_kernels.core.launch import Config

    for target in sweep.TARGETS:
        module, name = target.table.rpartition(".")[::2]
        table = getattr(importlib.import_module(f"vdcore_kernels.{module}"), name)
        assert all(isinstance(row, Config) for row in table)


BARE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('typer', 'rich', 'matplotlib', 'psutil', 'diffusers', 'av'):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
from vdcore_bench.suites.gpu.__main__ import main
sys.argv[1:] = ['--out', sys.argv[1]]
main()
"""
HERE = ("-o", f"{sys.prefix}/.ready", f"VENV={sys.prefix}")  # nothing is installed anew


def make(target, out, *flags):
    """The command, as it is typed; the flags come last, and win."""
    return ["make", "-C", str(plan.ROOT), *HERE, target, f"GPU_FLAGS={' '.join(['--out', str(out), *flags])}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize(
    ("command", "code"),
    [(("-c", BARE), 0), (("-m", "vdcore.cli", "bench", "gpu", "--out"), 1)],
    ids=["bare", "cli"],
)
def test_without_a_gpu_it_says_so(command, code, tmp_path):
    """Also where torch is all that is installed. `make gpu` is fine with that; a named suite that cannot run is not."""
    done = subprocess.run([sys.executable, *command, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and "no GPU" in done.stdout + done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_make_gpu_without_a_gpu_ends_well_and_leaves_nothing(tmp_path):
    done = subprocess.run(make("gpu", tmp_path / "out"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "no GPU" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_parts_end_with_2_and_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "ceilings,weather"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no part weather; there are selfcheck, build" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_ends_with_2_and_its_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--only", "selfcheck", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--out: " in (said := capsys.readouterr().err) and str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_another_run_writes_into_ends_with_2(tmp_path, capsys, monkeypatch):
    journal = Journal(tmp_path / FILE)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--only", "selfcheck", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    journal.close()
    assert f"--out: {tmp_path / FILE}: another run writes into it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# ---- Processes ----

PLAYED = """
import sys, os, time
from pathlib import Path
from vdcore_bench.measure.journal import Journal
from vdcore_bench.suites.gpu.child import Given, Steps
given = Given("frames", Path(sys.argv[1]), first=int(sys.argv[2]), patience=1.0, dry=True)
journal = Journal(given.file("jsonl"))
for step in Steps(given, journal)(["good", "hangs", "dies", "raises", "last"], str):
    if step == "hangs":
        time.sleep(60)
    if step == "dies":
        os.kill(os.getpid(), 11)
    if step == "raises":
        raise RuntimeError("it was written wrongly")
    journal.add([given.row(op="frames", case=step)])
"""


@pytest.fixture
def played(monkeypatch, tmp_path):
    """A conductor whose parts run the steps above."""

    def start(given):
        command = [sys.executable, "-c", PLAYED, str(given.out), str(given.first)]
        return conducting.Child(given, subprocess.Popen(command, stderr=subprocess.DEVNULL))

    monkeypatch.setattr(conducting.Child, "start", staticmethod(start))
    journal = Journal(tmp_path / FILE)
    yield conducting.Conductor(tmp_path, journal, dry=True)
    journal.close()


@pytest.mark.slow
def test_the_suite_goes_on_behind_what_hangs_or_dies(played):
    played.run("frames", 60)
    assert [row.case for row in played.journal.rows if row.provider != "all"] == ["good", "last"]
    lost = [row.reason for row in played.journal.rows if row.provider == "all"]
    assert lost[0] == "hangs: it hung" and lost[1].startswith("dies: its process ended with -11")
    assert lost[2].startswith("raises: its process ended with 1") and played.troubles == 3
    assert not list(played.out.glob("frames-*.jsonl"))


FOLLOWS = """
import sys, time
from vdcore_bench.suites.gpu.child import die_with_parent
die_with_parent(int(sys.argv[1]))
time.sleep(1)
print("alive")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="parents")
@pytest.mark.parametrize("killed", [False, True])
def test_a_part_whose_suite_was_killed_during_its_imports_ends(killed):
    """It has another parent then, which lives on."""
    parent = os.getppid() if killed else os.getpid()
    done = subprocess.run([sys.executable, "-c", FOLLOWS, str(parent)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == ((1, "") if killed else (0, "alive\n")), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="parents")
@pytest.mark.parametrize("killed", [False, True])
def test_a_part_is_told_who_started_it(killed, tmp_path, monkeypatch):
    if killed:
        monkeypatch.setattr(os, "getpid", os.getppid)
    started = conducting.Child.start(Given("ceilings", tmp_path, until=0.0, dry=True))
    assert started.process.wait(120) == int(killed)
    assert bool(started.rows()) != killed


@pytest.mark.slow
def test_a_part_whose_time_is_over_is_a_row_beside_its_rows(played, monkeypatch):
    monkeypatch.setattr(child.Given, "patience", 99.0)
    played.run("frames", 6)
    assert played.troubles >= 1 and any(
        "more than 6 s" in row.reason or "hung" in row.reason for row in played.journal.rows
    )


def test_steps_of_other_shards_and_of_before_are_left_out_and_time_ends_a_part(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    given = Given("smoke", tmp_path, shard=1, shards=2, first=3, dry=True)
    assert list(Steps(given, journal)("abcdef", str)) == ["d", "f"]
    assert list(Steps(replace(given, until=time.monotonic() - 1), journal)("abcdef", str)) == []
    assert journal.rows[-1].status == "skipped" and "d and what follows, 3 steps" in journal.rows[-1].reason
    journal.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_rows_survive_a_kill_and_the_next_run_adds_to_them(how, tmp_path):
    """`make gpu-dry`, ended midway with all that it has started."""
    command = make("gpu-dry", tmp_path, "--only", "selfcheck,frames")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    rows, end = [], time.monotonic() + 240
    while not any(row.op == "video_attention" for row in rows) and time.monotonic() < end:
        time.sleep(0.2)
        rows = parse((tmp_path / FILE).read_text()) if (tmp_path / FILE).exists() else []
    os.killpg(first.pid, how)
    said = first.communicate()[1].decode()
    assert first.returncode != 0 and (how == signal.SIGKILL or "rows are in" in said)
    kept = parse((tmp_path / FILE).read_text())
    assert len(kept) >= len(rows) > 11
    time.sleep(2)  # its child sees that it is alone
    subprocess.run(make("gpu-dry", tmp_path, "--only", "selfcheck"), check=True, capture_output=True)
    both = parse((tmp_path / FILE).read_text())
    assert both[: len(kept)] == kept and len(both) >= len(kept) + 11
    assert not list(tmp_path.glob("frames-*.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_the_stub_of_the_driver(tmp_path):
    """`make gpu-dry`: launches, no results. In less than nine minutes on a quiet machine, which no test asserts."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(make("gpu-dry", tmp_path), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = parse((tmp_path / FILE).read_text())
    assert {row.device for row in rows} == {child.DRY}
    assert not [row for row in rows if row.status == "failed" and row.provider.startswith("vdcore")]
    launched = {row.op for row in rows if row.metric == "error" and row.status == "ok" and "launched" in row.reason}
    assert launched == set(BACKENDS["triton"].operators) >= set(JOBS)
    timed = {row.op for row in rows if row.provider == "vdcore[triton]" and row.metric == "time" and row.status == "ok"}
    assert timed == set(JOBS) and any(row.case.startswith(SWEEP) for row in rows)
    assert {Path(path).name.split("-")[0] for path in tmp_path.glob("*.log")} == set(gpu.PARTS)


# ---- Tables ----


def test_rows_of_parts_are_collected_and_shown(tmp_path):
    base = Row(op="ceiling", workload="4 GiB", provider="copy", mode="fwd", device="cuda")
    size = {"B": 1, "T": 8, "S": 256, "H": 16, "D": 64}
    curve = replace(base, op="video_attention", case=f"{PROFILE}dense", provider="naive", x=8.0, shape=size)
    swept = replace(base, op="modulate", case=f"{SWEEP}adaln.ROWS", workload="wan", metric="time")
    rows = [
        replace(base, p50=2.0, bytes=8e9),
        replace(base, op="modulate", metric="error", error_ratio=1.5, status="failed", reason="error of x"),
        replace(curve, metric="memory", unit="bytes", p50=2.0**30),
        replace(swept, provider="table", variant="4 warps", p50=3e-3),
        replace(swept, provider="swept", variant="8 warps", p50=2e-3),
        conducting.trouble(Given("contract", tmp_path), conducting.ending(None, 5)),
    ]
    for i, row in enumerate(rows):
        journal = Journal(tmp_path / f"part-{i}-0.jsonl")
        journal.add([row])
        journal.close()
    found = list(conducting.salvage(tmp_path, rows[:1]))
    assert found == rows[1:] and not list(tmp_path.glob("part-*"))
    text = "".join(table.plain() for table in results.measured("Operators", rows))
    for words in ("4 GB/s", "1 of 1", "1 GiB", "more than 5 s", "error of x", "8 warps", "1.50x"):
        assert words in text
