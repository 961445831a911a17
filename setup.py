"""Builds vdcore._native with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build folder per Python, kept, so that a second install compiles only what changed."""

    def build_extension(self, ext):
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = Path(os.environ.get("VDCORE_BUILD_DIR", ROOT / "build" / f"cmake-{tag}"))
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        import pybind11

        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVDCORE_CUDA={os.environ.get('VDCORE_CUDA', 'ON')}",
        ]
        # A temporary build environment takes its ninja along when it goes: then the folder must be configured anew.
        cache = build / "CMakeCache.txt"
        if cache.exists() and "CMAKE_MAKE_PROGRAM" in (text := cache.read_text()):
            program = text.split("CMAKE_MAKE_PROGRAM:", 1)[1].split("=", 1)[1].splitlines()[0]
            if not Path(program).exists():
                cache.unlink()
                shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        if not cache.exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # A development install also gets the emulator of the CUDA kernels, which is for tests.
        modules = ["_native", *(["_cuda_emulated"] if self.editable_mode or self.inplace else [])]
        subprocess.run(["cmake", "--build", str(build), "--target", *modules, "--parallel", jobs], check=True)
        for name in modules:
            (module,) = build.glob(f"{name}*{sysconfig.get_config_var('EXT_SUFFIX')}")
            # The emulator is no part of the package: it goes where the sources are.
            path = target.with_name(module.name) if name == "_native" else ROOT / "vdcore" / module.name
            fresh = path.with_suffix(".new")
            shutil.copy2(module, fresh)
            fresh.replace(path)  # a process that runs the old module keeps it


setup(
    packages=[*find_packages(include=["vdcore", "vdcore.*"]), "vdcore.kernels", "vdcore.bench"],
    package_dir={"vdcore": "vdcore", "vdcore.kernels": "kernels", "vdcore.bench": "bench"},
    package_data={"vdcore": ["py.typed"], "vdcore.bench": ["workloads.json"]},
    ext_modules=[Extension("vdcore._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
