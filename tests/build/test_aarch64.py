"""The CPU engine on another architecture: its own test program, compiled for aarch64 and run under an emulator."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.compile("csrc/cpu/**/*.cpp", "csrc/common/*.cpp", "tests/tsan.cpp", "CMakeLists.txt", tools=[COMPILER]),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER} (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"needs {EMULATOR} (Debian: qemu-user)"),
]

# As CMakeLists.txt builds them where there is no x86-64.
VERSIONS = {
    "VDCORE_CPU_KERNELS": ["-DVDCORE_ISA=baseline"],
    "VDCORE_AMX_KERNELS": [
        *("-DVDCORE_ISA=amx_emulated", '-DVDCORE_ISA_NAME="amx-emulated"', "-DVDCORE_REST=baseline"),
        "-DVDCORE_EMULATED_TILES",
    ],
    "VDCORE_ENGINE_SOURCES": [],
}


def sources(name):
    (listed,) = re.findall(rf"set\({name}\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return re.findall(r"csrc/\S+\.cpp", listed)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    flags = ["-std=gnu++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-I", ROOT / "csrc"]
    jobs = [(source, more) for name, more in VERSIONS.items() for source in sources(name)]
    jobs.append(("tests/tsan.cpp", []))

    def compiled(job):
        number, (source, more) = job
        out = folder / f"{number}.o"
        subprocess.run([COMPILER, *flags, *more, "-c", ROOT / source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, enumerate(jobs)))
    subprocess.run([COMPILER, "-static", "-pthread", "-o", folder / "engine", *objects], check=True)
    return folder / "engine"


@pytest.mark.parametrize("isa", ["baseline", "amx-emulated"])
def test_the_engine_is_right_on_aarch64(program, isa):
    """Against plain loops, and the same bits from several callers with threads of their own."""
    environment = {**os.environ, "VDCORE_CPU_ISA": isa}
    ran = subprocess.run([EMULATOR, program, "numbers"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"{isa}: ")
