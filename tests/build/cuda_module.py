"""vdcore._cuda as nvcc and ptxas make it, for the tests that read its machine code."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc/cuda/**/*.cu", "csrc/cuda/*/bindings.cpp", "CMakeLists.txt", "tests/build/cuda_module.py")


@cache
def built() -> Path:
    """The module, in a build folder of its own, which is kept: what has not changed is not compiled again."""
    import pybind11

    folder = ROOT / "build" / "machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", ROOT, "-B", folder, "-DVDCORE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if shutil.which("ninja", path=env["PATH"]):
        env.setdefault("CMAKE_GENERATOR", "Ninja")
    with (folder / "lock").open("w") as lock:  # of all workers
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            configure,
            ["cmake", "--build", folder, "--target", "_cuda", "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return next(folder.glob("_cuda.*.so"))


def cuobjdump(*options: str) -> str:
    """What it prints about the module; Triton brings NVIDIA's binary tools where the toolkit has none."""
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(triton))
    if tool is None:
        pytest.skip("needs cuobjdump")
    return subprocess.run([tool, *options, built()], capture_output=True, text=True, check=True).stdout
