"""The CUDA kernels in machine code: what is in the module, nothing that spills, registers and memory as planned."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import vdcore


def _triton_tools() -> Path:
    """Triton brings NVIDIA's binary tools."""
    spec = importlib.util.find_spec("triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()


MODULE = next(Path(vdcore.__file__).parent.glob("_cuda.*.so"), None)
CUOBJDUMP = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(_triton_tools()))


class Usage(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    local: int


# Most registers a thread of each kernel may take: what its blocks per SM are chosen for.
PLAN = {
    "temporal_forward_kernel": 255,
    "temporal_backward_kernel": 255,
    "temporal_long_backward_kernel": 255,
    "spatial_gated_kernel": 255,
    "rows_norm_rope_kernel": 128,
    "rows_norm_rope_backward_kernel": 255,
    "rope_table_backward_kernel": 255,
}
ARCHITECTURES = {"sm_80", "sm_90a"}


def resources() -> list[Usage]:
    """What ``cuobjdump --dump-resource-usage`` says of every kernel of the module."""
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", MODULE], capture_output=True, text=True, check=True)
    found, arch = [], ""
    name = ""
    for line in dump.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Usage(name, arch, *map(int, match.groups())))
    return found


@pytest.fixture(scope="module")
def usage() -> list[Usage]:
    if CUOBJDUMP is None or MODULE is None:
        pytest.skip("needs cuobjdump and vdcore._cuda (make cuda)")
    return resources()


def test_every_kernel_is_there_for_every_architecture(usage):
    for kernel in PLAN:
        assert {u.arch for u in usage if kernel in u.name} == ARCHITECTURES
    every = [u for u in usage if "_sm90_" not in u.name]  # these have tests/build/test_hopper_code.py
    assert len({u.name for u in every}) * 2 == len([u for u in every if u.arch in ARCHITECTURES])


# Bytes of stack a thread, by kernel, tiles of 8 keys, chunks of 32 channels: beyond 64 frames, or 32 of 128 channels,
# arithmetic is the limit, and some registers are not there. All others: none.
SPILLS = {
    ("temporal_forward_kernel", 4, 8): 64,
    ("temporal_forward_kernel", 8, 4): 64,
    ("temporal_forward_kernel", 16, 4): 64,
    ("temporal_forward_kernel", 32, 2): 128,
    ("temporal_forward_kernel", 32, 4): 512,
    ("temporal_backward_kernel", 4, 4): 64,
    ("temporal_long_backward_kernel", 4, 0): 128,  # chunks alone, here and below
    ("temporal_long_backward_kernel", 8, 0): 512,
    ("rows_norm_rope_backward_kernel", 8, 0): 1024,  # 256 channels with norm or rope: no workload has them
    ("spatial_gated_kernel", 8, 0): 16,  # 256 channels, on sm_80 only
}


def test_spills(usage):
    found = []
    for u in usage:
        # A mangled name begins after its length; before it may stand a file's name, with a hash.
        match = re.search(r"(?<=\d)((?:temporal|spatial|rows|rope)_\w+?_kernel)INS\w*?Li(\d+)E(?:Li(\d+)E)?", u.name)
        allowed = SPILLS.get((match[1], int(match[2]), int(match[3] or 0)), 0) if match else 0
        if u.local or u.stack > allowed:
            found.append((u, allowed))
    assert not found


@pytest.mark.parametrize("kernel", PLAN)
def test_registers(usage, kernel):
    assert max(u.registers for u in usage if kernel in u.name) <= PLAN[kernel]


def test_module_loads_without_a_driver():
    if MODULE is None:
        pytest.skip("needs vdcore._cuda (make cuda)")
    code = "import vdcore; print(vdcore.backends()['cuda'])"
    env = {**os.environ, "VDCORE_CUDA_EMULATE": "0", "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "no CUDA device" in said
