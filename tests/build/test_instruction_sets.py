"""The CPU engine is compiled once per instruction set: no instruction may stand where a lesser processor reads it.

A function that a header leaves to the linker (an inline function, a template) exists once per object file, and the
linker keeps any one of them: the baseline would run the AVX-512 copy. So the objects of an instruction set may define
no symbol outside their own namespace, and the objects of a lesser one may hold no greater register.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVELOPMENT = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
BUILD = Path(os.environ.get("VDCORE_BUILD_DIR", DEVELOPMENT))  # as in setup.py
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instruction sets"),
    pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("nm") is None, reason="needs binutils"),
]


def objects(isa: str) -> list[Path]:
    folder = BUILD / "CMakeFiles" / f"vdcore_cpu_{isa}.dir"
    if isa in ("amx", "avx512_bf16") and not folder.exists():
        pytest.skip(f"vdcore was built with tools that know no {isa}")
    found = sorted(folder.rglob("*.o"))
    assert found, f"no objects of {isa} in {BUILD.name}: was vdcore built from this folder?"
    return found


def defined_symbols(path: Path) -> list[str]:
    lines = subprocess.run(["nm", "--defined-only", "-C", path], check=True, capture_output=True, text=True).stdout
    return [name for _, kind, name in (x.split(None, 2) for x in lines.splitlines()) if kind.isupper() or kind in "vw"]


@pytest.mark.parametrize("isa", ISAS)
def test_symbols_stay_in_their_namespace(isa: str) -> None:
    outside = [
        f"{path.name}: {name}"
        for path in objects(isa)
        for name in defined_symbols(path)
        if f"vdcore::cpu::{isa}::" not in name and not name.startswith("DW.ref")
    ]
    assert not outside, "\n".join(outside)


def code_of(path: Path) -> str:
    listing = ["objdump", "-d", "--no-show-raw-insn", path]
    return subprocess.run(listing, check=True, capture_output=True, text=True).stdout


BASELINE = r"%[yz]mm\d|%tmm\d|tilerelease"


@pytest.mark.parametrize(
    ("isa", "forbidden"),
    [
        ("baseline", BASELINE),
        ("amx_emulated", BASELINE),
        ("avx2", r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b|%tmm\d"),
        ("avx512", r"%tmm\d|tilerelease|dpbf16ps"),
        ("avx512_bf16", r"%tmm\d|tilerelease"),
    ],
)
def test_no_greater_registers(isa: str, forbidden: str) -> None:
    for path in objects(isa):
        found = re.search(rf"^.*(?:{forbidden}).*$", code_of(path), re.MULTILINE)
        assert found is None, f"{path.name}: {found.group()}"


def test_greater_registers_are_found_where_they_are() -> None:
    """The control: the same search must find what it looks for."""
    path = next(x for x in objects("avx512") if x.parent.name == "temporal_attention")
    assert re.search(r"%zmm\d", code_of(path))


def test_tiles_are_configured_multiplied_and_released_by_the_kernels_for_amx() -> None:
    kernels = [path for path in objects("amx") if not path.name.startswith("kernels")]
    assert kernels
    for path in kernels:
        code = code_of(path)
        for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
            assert re.search(rf"\b{instruction}\b", code), f"{path.name} has no {instruction}"
