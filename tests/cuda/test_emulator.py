"""The emulator that stands in for a GPU: a kernel that is wrong must fail under it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(folder: Path, source: Path, *include: Path, defined: str = "NOTHING") -> list[str]:
    """Lines that the program prints, compiled with the emulator; files in ``include`` come before those of csrc."""
    program = folder / source.stem
    paths = [f"-I{path}" for path in (*include, CSRC)]
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-w",
        f"-D{defined}",
        *paths,
        source,
        CSRC / "cuda" / "emulator.cpp",
        "-o",
        program,
    ]
    subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for line in run(tmp_path_factory.mktemp("instructions"), HERE / "instructions.cpp"):
        name, order, what = line.split(" ", 2)
        found.setdefault(name, {})[order] = what
    return found


@pytest.mark.parametrize("kernel", ["shared", "warp", "copied", "product"])
def test_right_kernels_are_right_in_every_order(said, kernel):
    assert set(said[kernel].values()) == {"right"}


@pytest.mark.parametrize(
    "kernel", ["shared-no-barrier", "warp-no-barrier", "copied-no-wait", "copied-too-few-waits", "product-rows-swapped"]
)
def test_wrong_kernels_give_wrong_results(said, kernel):
    assert "wrong" in said[kernel].values()


@pytest.mark.parametrize(
    "kernel,objection",
    [
        ("shared-lost-warp", "waits for ever at a barrier"),
        ("shared-beyond", "outside of every tensor"),
        ("warp-half", "waits for ever at vote"),
    ],
)
def test_what_a_kernel_must_not_do(said, kernel, objection):
    assert all(objection in what for what in said[kernel].values())


BACKWARD = HERE / "backward_bits.cpp"
BARRIER = ("sync_block();", "")
SHORT, NORM = "temporal_attention_backward.cuh", "norm_rope_backward.cuh"

# Kernel of backward_bits.cpp, header, what stands there and what to put in its place.
MUTANTS = [
    (0, SHORT, *BARRIER),
    (
        0,
        "rows.cuh",
        "transpose8x8(first.x[i].x[j]), transpose8x8(last",
        "transpose8x8(last.x[i].x[j]), transpose8x8(first",
    ),
    (1, NORM, *BARRIER),
    (1, NORM, "lo = a * cos + hi * sin;", "lo = a * cos - hi * sin;"),
    (2, "temporal_attention_backward_long.cuh", *BARRIER),
]


@pytest.mark.parametrize("kernel", [0, 1, 2])
def test_a_real_kernel_and_its_mutants(tmp_path, kernel):
    """Right: the same bits in every order of warps. Without a barrier or with terms exchanged: not these."""
    right = run(tmp_path, BACKWARD, defined=f"KERNEL={kernel}")
    assert len(right) == 4 and len(set(right)) == 1
    for i, (_, header, before, after) in enumerate(m for m in MUTANTS if m[0] == kernel):
        text = (CSRC / "cuda" / header).read_text()
        assert before in text
        folder = tmp_path / str(i)
        (folder / "cuda").mkdir(parents=True)
        (folder / "cuda" / header).write_text(text.replace(before, after))
        # Headers beside the changed one are found by the path they are included by, under csrc.
        assert set(run(folder, BACKWARD, folder, defined=f"KERNEL={kernel}")) != set(right), (header, before)
