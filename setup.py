"""Builds the compiled modules with CMake; everything else about the package is in pyproject.toml.

``VDCORE_CUDA=ON`` builds ``vdcore._cuda`` too, ``OFF`` does not, and ``AUTO``, the default, does where there are a GPU
and nvcc. ``VDCORE_BUILD_DIR`` is the folder that CMake builds in, ``MAX_JOBS`` the number of compilers at once.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# A folder of sources -> the package in it.
SOURCE_ROOTS = {".": "vdcore", "kernels": "vdcore_kernels", "bench": "vdcore_bench"}
MODULES = ("vdcore._native", "vdcore._cuda", "vdcore._cuda_emulated")


def has_gpu() -> bool:
    """An NVIDIA driver is installed and finds a device."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def nvcc_for_cuda() -> str | None:
    """The compiler of ``vdcore._cuda``, or None where that is not to be built."""
    wanted = os.environ.get("VDCORE_CUDA", "AUTO").upper()
    if wanted not in ("ON", "OFF", "AUTO"):
        raise SystemExit(f"VDCORE_CUDA must be ON, OFF or AUTO, got {wanted}")
    if wanted == "OFF" or (wanted == "AUTO" and not has_gpu()):
        return None
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        missing = "nvcc is neither in PATH nor in /usr/local/cuda/bin, and CUDACXX does not name it"
        if wanted == "ON":
            raise SystemExit(f"VDCORE_CUDA=ON: {missing}")
        print(f"vdcore: there is a GPU, but {missing}: vdcore._cuda is not built", file=sys.stderr)
    return nvcc


class CMakeBuild(build_ext):
    """One CMake build folder per Python, kept, so that a second install compiles only what changed."""

    def run(self):
        nvcc = nvcc_for_cuda()
        # The emulator of the CUDA kernels is for tests: it is built in place alone.
        built = {
            "vdcore._native",
            *(["vdcore._cuda"] if nvcc else []),
            *(["vdcore._cuda_emulated"] if self.inplace else []),
        }
        self.extensions = [ext for ext in self.extensions if ext.name in built]
        for name in set(MODULES) - built:
            # Left by an earlier build, it would go into a wheel. In place, `make cuda` lasts until CUDA is turned off.
            if not self.inplace or os.environ.get("VDCORE_CUDA", "").upper() == "OFF":
                Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        folder = self.compile([name.rpartition(".")[2] for name in sorted(built)], nvcc)
        for name in built:
            path = Path(self.get_ext_fullpath(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            shutil.copy2(folder / path.name, fresh)
            fresh.replace(path)  # a process that runs the old module keeps it

    def compile(self, targets: list[str], nvcc: str | None) -> Path:
        """The folder where CMake has built the targets."""
        import pybind11

        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder = Path(os.environ.get("VDCORE_BUILD_DIR", ROOT / "build" / f"cmake-{tag}"))
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # Never switched off again: CMake would delete what nvcc has compiled.
            *(["-DVDCORE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        ]
        # A temporary build environment takes its ninja along when it goes: then the folder must be configured anew.
        cache = folder / "CMakeCache.txt"
        text = cache.read_text() if cache.exists() else ""
        tools = re.findall(r"^CMAKE_(?:MAKE_PROGRAM|CUDA_COMPILER):\w+=(/.+)$", text, re.MULTILINE)
        if not all(Path(tool).exists() for tool in tools):
            cache.unlink()
            shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
        if not cache.exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(folder), "--target", *targets, "--parallel", jobs], check=True)
        return folder


if __name__ == "__main__":
    setup(
        packages=[name for root in SOURCE_ROOTS for name in find_packages(root, include=["vdcore*"])],
        package_dir={package: f"{root}/{package}" for root, package in SOURCE_ROOTS.items()},
        package_data={"vdcore": ["py.typed"], "vdcore_bench": ["workloads.json"]},
        ext_modules=[Extension(name, sources=[]) for name in MODULES],
        cmdclass={"build_ext": CMakeBuild},
    )
