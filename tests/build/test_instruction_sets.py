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
ISAS = ("baseline", "avx2", "avx512")

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instruction sets"),
    pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("nm") is None, reason="needs binutils"),
]


def objects(isa: str) -> list[Path]:
    found = sorted((BUILD / "CMakeFiles" / f"vdcore_cpu_{isa}.dir").rglob("*.o"))
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


@pytest.mark.parametrize(
    ("isa", "forbidden"), [("baseline", r"%[yz]mm\d"), ("avx2", r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b")]
)
def test_no_greater_registers(isa: str, forbidden: str) -> None:
    for path in objects(isa):
        code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
        found = re.search(rf"^.*(?:{forbidden}).*$", code.stdout, re.MULTILINE)
        assert found is None, f"{path.name}: {found.group()}"


def test_greater_registers_are_found_where_they_are() -> None:
    """The control: the same search must find what it looks for."""
    path = next(x for x in objects("avx512") if x.parent.name == "temporal_attention")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
    assert re.search(r"%zmm\d", code.stdout)
