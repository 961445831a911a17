"""What every launch shares: device guard, one-dimensional grids, strides in aligned steps, choice of a config row.

A launcher runs three ways: on a GPU; on CPU tensors under ``TRITON_INTERPRET=1``; and on meta tensors inside
:func:`recording`, which launches nothing and keeps what would have been launched, to be compiled ahead of time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1  # of grid axis x; axes y and z end at 65,535 and are never used


@cache
def _serves(prefixes: str, arch: str) -> bool:
    return any(arch.startswith(prefix) for prefix in prefixes.split("|"))


@dataclass(frozen=True)
class Config:
    """A row of a kernel's table: the first row that fits the device and the call is taken.

    Args:
        arch: prefixes of the architectures it is meant for ("sm_9" serves sm_90); "" serves all.
        warps, stages: per program; depth of software pipelining.
        why: the reason for these numbers.
        registers: of a thread at most; 0: NVIDIA's compiler chooses, and rather spills 8 to 16 bytes than have one
            program less on a multiprocessor. AMD's chooses always.
    """

    arch: str
    warps: int
    stages: int
    why: str
    registers: int = field(default=0, kw_only=True)

    def serves(self, arch: str) -> bool:
        return _serves(self.arch, arch)

    def options(self, *, amd: bool) -> dict[str, Any]:
        """What Triton's compiler is told, by its names."""
        told: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return told if amd or not self.registers else {**told, "maxnreg": self.registers}


@dataclass(frozen=True)
class ValuesConfig(Config):
    """values: of a row's channels, times rows, that a program holds at a time."""

    values: int = 4096


@dataclass(frozen=True)
class Launch:
    """What would have been launched; the arguments by the kernel's names."""

    kernel: Any
    programs: int
    config: Config
    arguments: dict[str, Any]


class _State(threading.local):
    arch: str = ""  # while recording
    launches: list[Launch] | None = None
    forced: tuple[Config, ...] = ()


_state = _State()


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Launches of this thread are kept instead of run, with the configs of the named architecture."""
    before = _state.arch, _state.launches
    _state.arch, _state.launches = arch, []
    try:
        yield _state.launches
    finally:
        _state.arch, _state.launches = before


@contextmanager
def force(*configs: Config) -> Iterator[None]:
    """Tables that hold one of these rows choose it, whatever the device and the call; in this thread.

    A GPU's backward is on it too: autograd would run that on a thread of its own.
    """
    before = _state.forced
    _state.forced = configs
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _state.forced = before


@cache
def _device_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(x: Tensor) -> str:
    """``"sm_90"``, ``"gfx942"``, ... ; ``"interpreter"`` for tensors on the CPU."""
    if _state.launches is not None:
        return _state.arch
    return _device_arch(x.device.index) if x.is_cuda else "interpreter"


def is_amd(x: Tensor) -> bool:
    """Whether kernels on a tensor are compiled for AMD's GPUs."""
    return arch_of(x).startswith("gfx")


Row = TypeVar("Row", bound=Config)


def pick(table: Sequence[Row], arch: str, fits: Any = None) -> Row:
    """The first row that serves the architecture and for which ``fits(row)`` holds."""
    if _state.forced:
        for row in table:
            if row in _state.forced:
                return row
    for row in table:
        if row.serves(arch) and (fits is None or fits(row)):
            return row
    raise RuntimeError(f"no config for {arch} in a table of {len(table)} rows")


def _guard(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def launch(kernel: Any, programs: int, *, like: Tensor, config: Config, **arguments: Any) -> None:
    """Runs ``programs`` programs on the device of ``like``, on its current stream; 0: nothing to do.

    ``arguments``: the kernel's, constants included, by its names.
    """
    if programs == 0:
        return
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{kernel.__name__}: {programs} programs, and a grid holds {MAX_PROGRAMS}")
    if _state.launches is not None:
        _state.launches.append(Launch(kernel, programs, config, arguments))
        return
    with _guard(like):
        kernel[(programs,)](**arguments, **config.options(amd=is_amd(like)))


def _prepare_interpreter() -> None:
    """Loop bounds for numpy 2.4, which no longer converts one-element arrays to numbers; quicker calls; exact products.

    The interpreter patches the language again at every call of a device function, which is half the time of a small
    test: what the launch patched still holds, and what a module of Triton's own needs is never taken back. Its
    products sum in the order of numpy's BLAS, on which the rounding of a GPU does not depend: they are rounded once.
    """
    import numpy as np
    from triton.runtime import interpreter

    def dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        with np.errstate(invalid="ignore"):  # infinite values that a mask then hides, which a GPU says nothing about
            total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    patch = interpreter._patch_lang_tensor
    patched_modules = set()

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if not module.startswith("vdcore_kernels.") and module not in patched_modules:
            patched_modules.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpretedFunction.__call__ = call


if triton.knobs.runtime.interpret:
    _prepare_interpreter()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def how_many(values: int, size: int) -> int:
    """The largest power of two of things of ``size`` values that ``values`` hold, at least 1."""
    return max(power_of_2(values // size + 1) // 2, 1)


@cache
def parts(D: int) -> tuple[int, int]:
    """A row of D channels as one or two power-of-two tiles (0: no second one): 72 = 64 + 16, not 128.

    A tile has 16 channels at least, the depth of a tensor-core instruction. 104 = 64 + 64 is 128 in one.
    """
    whole = max(power_of_2(D), 16)
    first = whole if whole == D or whole == 16 else whole // 2
    second = max(power_of_2(D - first), 16) if first < D else 0
    return (whole, 0) if first + second >= whole else (first, second)


def step(*tensors: Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides every stride but the innermost, in elements.

    Kernels take strides in such steps and multiply by the constant, so that the compiler knows rows to be aligned where
    strides are not multiples of 16: 72 channels. A caller's pointer alignment Triton looks at by itself.
    """
    A = 16 // max(x.element_size() for x in tensors)
    for x in tensors:
        for n, s in zip(x.shape[:-1], x.stride()[:-1]):
            while n > 1 and s % A:
                A //= 2
    return A


def steps(x: Tensor, A: int) -> tuple[int, ...]:
    """Strides of all axes but the innermost, in steps of A elements; 0 where an axis has one entry."""
    return tuple(s // A if n > 1 else 0 for n, s in zip(x.shape[:-1], x.stride()[:-1]))
