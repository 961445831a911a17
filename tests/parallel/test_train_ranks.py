"""``vdcore train --ranks``: the losses of one process, other numbers of ranks, and a rank that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "vdcore.cli", "train"]
TINY = ["--batch=2", "--width=24", "--depth=2", "--heads=3", "--hold=0.5", "--forcing=0.5", "--save-every=2"]


def train(out, *arguments):
    done = subprocess.run([*COMMAND, *TINY, f"--out={out}", *arguments], capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["factorized", "gated", "full"])
def test_losses_are_those_of_one_process(attention, tmp_path):
    arguments = f"--attention={attention}", "--steps=6"
    alone, shared = (train(tmp_path / str(n), *arguments, f"--ranks={n}") for n in (1, 2))
    assert shared == pytest.approx(alone, rel=1e-4)


def ranks_by_hand(out, ranks, *arguments):
    """What torchrun would start, without its agent, which would end the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_RUN_ID": "by hand", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*COMMAND, *TINY, f"--out={out}", f"--ranks={ranks}", "--patience=20", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def test_a_killed_rank_ends_the_others_and_any_number_goes_on(tmp_path):
    alone = train(tmp_path / "alone", "--steps=40")
    out = tmp_path / "shared"
    processes = ranks_by_hand(out, 3, "--steps=40")
    try:
        until = time.monotonic() + 240
        while not (out / "losses.jsonl").exists() or len(losses(out)) < 5:
            assert time.monotonic() < until
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        for rank in (0, 2):
            _, error = processes[rank].communicate(timeout=240)
            assert processes[rank].returncode == 1
            assert "could not exchange with the others: one of them has ended" in error
        assert time.monotonic() - begin < 30
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(losses(out)) < 40
    assert train(out, "--steps=40", "--ranks=2") == pytest.approx(alone, rel=1e-3)


def test_another_number_of_processes_is_refused(tmp_path):
    (process,) = ranks_by_hand(tmp_path, 1, "--ranks=2", "--steps=2")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1 and "--ranks: 2, but torchrun has started 1 processes" in error
