"""The CUDA kernels in machine code: what is in the module, nothing that spills, registers and memory as planned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import NamedTuple

import cuda_module
import pytest

pytestmark = [pytest.mark.compile(*cuda_module.SOURCES, tools=["nvcc"]), pytest.mark.timeout(1800)]


class Usage(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    local: int


# Most registers per thread of each kernel may take: what its blocks per SM are chosen for.
PLAN = {
    "temporal_forward_kernel": 255,
    "temporal_long_forward_kernel": 255,
    "temporal_backward_kernel": 255,
    "temporal_long_backward_kernel": 255,
    "rows_norm_rope_kernel": 168,
    "rows_norm_rope_backward_kernel": 255,
    "rope_table_backward_kernel": 255,
}
ARCHITECTURES = {"sm_80", "sm_90"}


@pytest.fixture(scope="module")
def usage() -> list[Usage]:
    """What ``cuobjdump`` says of every kernel of the module."""
    found, arch, name = [], "", ""
    for line in cuda_module.cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Usage(name, arch, *map(int, match.groups())))
    return found


def test_every_kernel_is_there_for_every_architecture(usage):
    for kernel in PLAN:
        assert {u.arch for u in usage if kernel in u.name} == ARCHITECTURES
    every = [u for u in usage if "_sm90_" not in u.name]  # these have tests/build/test_hopper_code.py
    assert len({u.name for u in every}) * 2 == len([u for u in every if u.arch in ARCHITECTURES])


# Bytes of stack a thread, by kernel, tiles of 8 keys, chunks of 32 channels: a register or two that are kept through
# one part of a kernel, or a width that no model trains. All others: none.
SPILLS = {
    ("temporal_forward_kernel", 2, 4): 56,
    ("temporal_forward_kernel", 4, 8): 8,
    ("temporal_backward_kernel", 2, 2): 8,
    ("temporal_backward_kernel", 2, 3): 24,
    ("temporal_backward_kernel", 2, 4): 88,
    ("temporal_backward_kernel", 4, 2): 24,
    ("temporal_backward_kernel", 4, 3): 8,
    ("temporal_backward_kernel", 4, 4): 64,
    ("temporal_long_forward_kernel", 3, 0): 8,  # chunks alone, here and below
    ("temporal_long_backward_kernel", 4, 0): 72,
    ("temporal_long_backward_kernel", 8, 0): 16,
    ("rows_norm_rope_kernel", 4, 0): 8,
    ("rows_norm_rope_kernel", 8, 0): 64,
    ("rows_norm_rope_backward_kernel", 8, 0): 464,  # 256 channels with norm or rope: no workload has them
}


def allowed_spills(u: Usage) -> int:
    # A mangled name begins after its length; before it may stand a file's name, with a hash.
    match = re.search(r"(?<=\d)((?:temporal|rows|rope)_\w+?_kernel)INS\w*?Li(\d+)E(?:Li(\d+)E)?", u.name)
    if match is None:
        return 0
    if u.arch == "sm_90" and match[1] in ("temporal_forward_kernel", "temporal_backward_kernel"):
        return 0 if "FusedE2" not in u.name else SPILLS.get((match[1], int(match[2]), int(match[3])), 0)  # layer norm
    return SPILLS.get((match[1], int(match[2]), int(match[3] or 0)), 0)


def test_spills(usage):
    assert not [(u, allowed_spills(u)) for u in usage if u.local or u.stack > allowed_spills(u)]


@pytest.mark.parametrize("kernel", PLAN)
def test_registers(usage, kernel):
    assert max(u.registers for u in usage if kernel in u.name) <= PLAN[kernel]


def test_launches_are_found_in_the_machine_code():
    """Rows of `vdcore doctor --compile --json`, on the code of the chip's family; and of PTX where there is none."""
    pytest.importorskip("triton")
    from vdcore_bench.machine_code import cuda

    if cuda.cuda.missing() is not None:
        pytest.skip(f"cuda: {cuda.cuda.missing()}")
    rows = cuda.rows(cuda_module.built(), ["sm_89", "sm_90"])
    assert len(rows) > 40 and not [row for row in rows if row["bound_by"].startswith("it fails")]
    assert all(row["regs"] and row["instructions"] and row["warps"] for row in rows)
    assert {row["op"] for row in rows if row["arch"] == "sm_89"} == {"temporal_attention", "qk_norm_rope"}
    hopper = [row for row in rows if row["kernel"].startswith("frame_attention_sm90_fwd_kernel")]
    assert len(hopper) > 4 and all(row["mma"] and row["flops"] for row in hopper)
    for row in rows:
        plan = re.search(r"FramePlan<\d+, (\d+),", row["kernel"])  # warpgroups that multiply, beside one that loads
        assert row["warps"] in ((4 * (int(plan[1]) + 1),) if plan else (4, 8)), row
    name = "rows_norm_rope_kernel<bf16, 4, (Pairs)0>"
    (code,) = cuda.code_on("sm_120", cuda_module.built(), frozenset({name})).values()
    assert code.usage["REG"] > 32 and "LDG.E.128" in code.sass


def test_the_module_loads_without_a_driver():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("vdcore._cuda", {str(cuda_module.built())!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.why_not_device(0))
"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "no CUDA device" in said
