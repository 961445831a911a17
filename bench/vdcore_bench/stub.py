"""Launches without a GPU: a stub of NVIDIA's driver under Triton's real runtime and launchers, on CPU tensors.

Triton compiles for the named architecture, makes its launcher in C and calls ``cuLaunchKernelEx``, which only keeps
what it was given: no kernel runs, and outputs hold whatever their memory held. Every launch is held to what was asked
for: each parameter has the bytes of its argument, at the place and of the size that the kernel's PTX declares. For
tests, and for ``make gpu-dry``; once installed, for the rest of the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The driver's functions that Triton's launcher calls. A function handle is a struct Kernel.
_SOURCE = r"""
#include "cuda.h"
#include <string.h>
typedef struct { int count; int size[512]; } Kernel;
static unsigned char parameters[16384];
static int bytes;
CUresult cuGetErrorString(CUresult e, const char** s) { *s = "stub"; return 0; }
CUresult cuCtxGetCurrent(CUcontext* c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuDeviceGet(CUdevice* d, int i) { *d = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr*)data = p; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** p, void** extra) {
  const Kernel* kernel = (const Kernel*)f;
  bytes = 0;
  for (int i = 0; i < kernel->count; ++i) {
    memcpy(parameters + bytes, p[i], kernel->size[i]);
    bytes += kernel->size[i];
  }
  return 0;
}
int stub_parameters(unsigned char* out) { memcpy(out, parameters, bytes); return bytes; }
"""
_PARAMETER = re.compile(r"\.param \.(?:[busf])(\d+)\s+(?:\.ptr[^,\n]*?)?\w+_param_\d+")
_PACKED = {"i1": "<b", "u1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I"}
_PACKED |= {"i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}
_RESERVED = 2  # pointers that Triton appends: to scratch memory of its own


@dataclass(frozen=True)
class Launched:
    """One launch.

    Args:
        threads: of a program.
        bytes: of its parameters.
    """

    kernel: str
    programs: int
    threads: int
    bytes: int


class _Kernel(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int), ("size", ctypes.c_int * 512)]


class Stub:
    """What has been launched and compiled since it was installed.

    Args:
        compiled: names of kernels as they were loaded: one per specialization.
    """

    def __init__(self, library: Any, arch: str) -> None:
        self.library, self.arch = library, arch
        self.launches: list[Launched] = []
        self.compiled: list[str] = []
        self.fresh = 0  # compiled in this process, not found in Triton's cache
        self.ptx = ""
        self.keep: list[_Kernel] = []

    def load(self, name: str) -> int:
        """The handle of a kernel, whose PTX says how large its parameters are."""
        entry = self.ptx[self.ptx.index(".entry") :].split(")", 1)[0]
        sizes = [int(bits) // 8 for bits in _PARAMETER.findall(entry)]
        kernel = _Kernel(len(sizes), (ctypes.c_int * 512)(*sizes))
        self.keep.append(kernel)
        self.compiled.append(name)
        return ctypes.addressof(kernel)

    def parameters(self) -> bytes:
        """Of the last launch, one after the other."""
        found = ctypes.create_string_buffer(16384)
        size = self.library.stub_parameters(found)
        return found.raw[:size]


INSTALLED: Stub | None = None


def install(arch: str = "sm_90", folder: Path | None = None) -> Stub:
    """Makes this process launch on the stub: vdcore's Triton backend then takes CPU tensors of every dtype.

    Args:
        folder: where the stub's library is built; default: a new one.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where nothing is launched, or without a C compiler.
    """
    global INSTALLED
    if INSTALLED is not None:
        return INSTALLED
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted with TRITON_INTERPRET=1, not launched: unset it")
    folder = folder or Path(tempfile.mkdtemp(prefix="vdcore-stub-"))
    stub = Stub(_library(folder), arch)
    _set_driver(stub)
    _let_cpu_tensors_pass(arch)
    INSTALLED = stub
    return stub


def _library(folder: Path) -> Any:
    """The stub as libcuda, loaded so that launchers find it by its name."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libcuda.so.1"
    if not target.exists():
        source, made = folder / f"stub-{os.getpid()}.c", folder / f"stub-{os.getpid()}.so"
        source.write_text(_SOURCE)
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-I", include, source, "-o", made]
        done = subprocess.run([*map(str, command), "-Wl,-soname,libcuda.so.1"], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the stub of the driver cannot be built: {done.stderr[-2000:]}")
        made.replace(target)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder.resolve())  # what launchers are linked to
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def _flat(x: Any) -> list[Any]:
    return [z for y in x for z in _flat(y)] if isinstance(x, (tuple, list)) else [x]


def _expected(signature: Any, arguments: Any) -> bytes:
    """What the parameters should hold, by the kernel's signature."""
    found = b""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            found += _expected(kind, tuple(value))
        elif kind.startswith("*"):
            found += struct.pack("<Q", 0 if value is None else value.data_ptr())
        elif kind != "constexpr":
            found += struct.pack(_PACKED[kind], value)
    return found


def _set_driver(stub: Stub) -> None:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    class Launcher(CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.signature, self.name = tuple(source.signature.values()), source.fn.__name__

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            super().__call__(x, y, z, stream, function, packed, *rest)
            expected, found = _expected(self.signature, rest[3:]), stub.parameters()
            if found != expected + bytes(8 * _RESERVED):
                raise RuntimeError(f"{self.name}: parameters are {found.hex()}, expected {expected.hex()}")
            stub.launches.append(Launched(self.name, x * y * z, 32 * packed[0], len(found)))

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            return 1, stub.load(name), 0, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        launcher_cls, utils = Launcher, Utils()

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", int(stub.arch[3:]), 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    init = CompiledKernel._init_handles

    def init_handles(kernel: Any) -> None:
        stub.ptx = kernel.asm["ptx"]
        init(kernel)

    def listen(*given: Any, **named: Any) -> None:
        stub.fresh += not named["cache_hit"]

    CompiledKernel._init_handles = init_handles
    knobs.compilation.listener = listen
    driver.set_active(Driver())


def _let_cpu_tensors_pass(arch: str) -> None:
    """vdcore asks where tensors are; here they may be on the CPU, and are taken as a GPU's."""
    from vdcore.ops import choose
    from vdcore.ops import triton as operators
    from vdcore_kernels.core import launch

    def why_not(x: torch.Tensor) -> str | None:
        return None if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"it has no {x.dtype}"

    def arch_of(x: torch.Tensor) -> str:
        return real_arch(x) if x.device.type == "meta" else arch

    real_why_not, real_arch = operators.why_not, launch.arch_of
    setattr(operators, "interpreted", lambda: True)  # noqa: B010  it is cached, and typed so
    operators.missing.cache_clear()
    _replace("vdcore.ops.", "why_not", real_why_not, why_not)
    _replace("vdcore_kernels.", "arch_of", real_arch, arch_of)
    choose.ORDER["cpu"] = choose.ORDER["cuda"]


def _replace(package: str, name: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In all modules of the package: those that are imported later take it from where it is defined."""
    for module, found in list(sys.modules.items()):
        if module.startswith(package) and getattr(found, name, None) is old:
            setattr(found, name, new)
