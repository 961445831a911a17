"""Every Triton kernel compiled ahead of time, for any architecture, without a GPU: registers, spills, shared memory.

Calls of every operator run on meta tensors, and what they would launch is kept and compiled. ``vdcore doctor
--compile`` prints the result; the test suite holds it to: nothing fails, nothing spills, everything fits.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.grid_mask import GridMask
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.call import Call
from vdcore.ops.choose import BACKENDS
from vdcore.ops.operator import capture
from vdcore.ops.tile_attention.boxes import tiles_of
from vdcore.rope import Rope
from vdcore.tile_lists import TileLists
from vdcore_bench.jobs.base import Job
from vdcore_kernels.core.launch import Launch, recording

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a program can have.
_SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_87": 166_912, "sm_89": 101_376, "sm_9": 232_448, "sm_10": 232_448}
_SHARED |= {"sm_12": 101_376, "gfx950": 163_840, "gfx": 65_536}


@dataclass(frozen=True)
class Record:
    """One kernel, config and call on one architecture; ``problem`` is None where all is well.

    Args:
        registers: of a thread.
        spills: bytes of a thread's local memory.
        shared: bytes of a program's shared memory.
        seconds: that it took to compile.
    """

    kernel: str
    arch: str
    config: str
    call: str
    registers: int
    spills: int
    shared: int
    seconds: float
    problem: str | None


def _t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _qkv(T: int, S: int, H: int, D: int, *, T_k: int = 0, G: int = 0, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    kv = (1, T_k or T, S, G or H, D)
    return {"q": _t(1, T, S, H, D, dtype=dtype), "k": _t(*kv, dtype=dtype), "v": _t(*kv, dtype=dtype)}


def _norm(H: int, G: int, D: int, kind: Any = "rms", over: Any = "head") -> QKNorm:
    q, k = (D, D) if over == "head" else (H * D, G * D)
    biases = (_t(q), _t(k)) if kind == "layer" else (None, None)
    return QKNorm(_t(q), _t(k), kind, over, 1e-6, *biases)


def _rope(F: int, S: int, R: int, style: Any = "interleaved") -> Rope:
    # As models have it: a constant.
    cos, sin = (torch.empty(F, S, R // 2, dtype=torch.float32, device="meta") for _ in range(2))
    return Rope(cos, sin, style)


def _temporal(
    T: int, H: int, D: int, *, norm: str = "", rope: str = "", mask: FrameMask = FrameMask(), **kw: Any
) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        args = {**_qkv(T, 256, H, D, **kw), "mask": mask}
        if norm:
            args["norm"] = _norm(H, kw.get("G") or H, D, *norm.split("/"))
        if rope:
            args["rope"] = _rope(T, 1, D // 2 * 2, rope)
        return args

    return build


def _int(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _text(L: int, H: int, D: int, dtype: Any = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(_t(1, L, H, D, dtype=dtype) for _ in range(3))


def _gated(T: int, S: int, H: int, D: int, gate: tuple[int, ...] = (), **kw: Any) -> dict[str, Any]:
    triples = [tuple(_qkv(T, S, H, D).values()) for _ in range(2)]
    return {"spatial": triples[0], "temporal": triples[1], "gate": _t(*(gate or (H, 1))), **kw}


_WINDOWS: dict[str, Any] = {"mask": GridMask.neighborhood((3, 7, 11)), "grid": (20, 22)}


def _tiles(H: int, D: int, tile: tuple[int, int, int]) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        T, grid = 8, (16, 24)
        n = tiles_of(T, grid, tile)
        lists = TileLists(_int(1, H, n, 4).to(torch.int32), _int(1, H, n).to(torch.int32))
        return {**_qkv(T, grid[0] * grid[1], H, D), "tiles": lists, "tile": tile, "grid": grid}

    return build


def _norm_over(H: int, D: int) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        norm, rope = _norm(H, H, D, "layer", "all"), Rope(_t(16, 256, D // 2), _t(16, 256, D // 2))
        return {"q": _t(1, 16, 256, H, D), "k": _t(1, 16, 256, H, D), "norm": norm, "rope": rope}

    return build


def _modulate(C: int) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        tables = {name: _t(2, C) for name in ("shift", "scale")}
        return {"x": _t(2, 4, 256, C), **tables, "weight": _t(C), "bias": _t(C)}

    return build


_CAUSAL = FrameMask.causal()
_SHOTS = FrameMask(past=3, future=0, shots=(0, 7, 12))


def _forced(frames: int, chunk: int = 3) -> FrameMask:
    return FrameMask.teacher_forcing(frames, chunk)


_F32, _F16 = torch.float32, torch.float16
_RMS: dict[str, Any] = {"norm": "rms/head", "rope": "interleaved"}

# name -> (operator, arguments, whether it is one of the few that every architecture is tried on).
CALLS: dict[str, tuple[str, Callable[[], dict[str, Any]], bool]] = {
    "T 16, 16 x 72": ("temporal_attention", _temporal(16, 16, 72), True),
    "T 16, 16 x 72, norm, rope": ("temporal_attention", _temporal(16, 16, 72, **_RMS), True),
    "T 30, 16 x 72, norm, rope": ("temporal_attention", _temporal(30, 16, 72, **_RMS), False),
    "T 25, 5 x 64": ("temporal_attention", _temporal(25, 5, 64), False),
    "T 16, 8 x 40": ("temporal_attention", _temporal(16, 8, 40), False),
    "T 16, 8 x 80": ("temporal_attention", _temporal(16, 8, 80), False),
    "T 16, 8 x 96": ("temporal_attention", _temporal(16, 8, 96), False),
    "T 16, 8 x 160": ("temporal_attention", _temporal(16, 8, 160), False),
    "T 16, 8 x 256": ("temporal_attention", _temporal(16, 8, 256), False),
    "T 28, 24 x 128": ("temporal_attention", _temporal(28, 24, 128), True),
    "T 28, 24 x 128, norm, rope": ("temporal_attention", _temporal(28, 24, 128, norm="rms/head", rope="half"), False),
    "T 28, 24 x 128, causal": ("temporal_attention", _temporal(28, 24, 128, mask=_CAUSAL), True),
    "T 21, 12 x 128, layer norm over all": ("temporal_attention", _temporal(21, 12, 128, norm="layer/all"), False),
    "T 16, 8 x 64, layer norm": ("temporal_attention", _temporal(16, 8, 64, norm="layer/head"), False),
    "T 64, 16 x 72": ("temporal_attention", _temporal(64, 16, 72), False),
    "T 60, 24 x 128": ("temporal_attention", _temporal(60, 24, 128), False),
    "T 60, 24 x 128, causal": ("temporal_attention", _temporal(60, 24, 128, mask=_CAUSAL), False),
    "T 120, 24 x 64": ("temporal_attention", _temporal(120, 24, 64), False),
    "T 120, 24 x 128": ("temporal_attention", _temporal(120, 24, 128), False),
    "T 128, 8 x 256": ("temporal_attention", _temporal(128, 8, 256), False),
    "T 240, 8 x 64": ("temporal_attention", _temporal(240, 8, 64), False),
    "T 240, 8 x 128, norm, rope": ("temporal_attention", _temporal(240, 8, 128, norm="rms/head", rope="half"), False),
    "T 240, 8 x 256": ("temporal_attention", _temporal(240, 8, 256), False),
    "T 240, 8 x 64, causal": ("temporal_attention", _temporal(240, 8, 64, mask=_CAUSAL), False),
    "T 240, 8 x 128, causal": ("temporal_attention", _temporal(240, 8, 128, mask=_CAUSAL), False),
    "T 240, 8 x 256, causal": ("temporal_attention", _temporal(240, 8, 256, mask=_CAUSAL), False),
    "T 42, 12 x 128, teacher forcing": ("temporal_attention", _temporal(42, 12, 128, mask=_forced(21)), False),
    "T 16, 16 x 72, shots": ("temporal_attention", _temporal(16, 16, 72, mask=_SHOTS), False),
    "T 240, 8 x 64, teacher forcing": ("temporal_attention", _temporal(240, 8, 64, mask=_forced(120)), False),
    "T 240, 8 x 64, shots": ("temporal_attention", _temporal(240, 8, 64, mask=_SHOTS), False),
    "T 4 to 16, grouped, causal": ("temporal_attention", _temporal(4, 8, 64, T_k=16, G=2, mask=_CAUSAL), False),
    "T 16, 8 x 64, float32": ("temporal_attention", _temporal(16, 8, 64, dtype=_F32), False),
    "T 16, 8 x 64, float16": ("temporal_attention", _temporal(16, 8, 64, dtype=_F16), False),
    "S 1024, 16 x 72": ("spatial_attention", lambda: _qkv(16, 1024, 16, 72), False),
    "S 3600, 16 x 64": ("spatial_attention", lambda: _qkv(16, 3600, 16, 64), True),
    "S 1024, 8 x 160": ("spatial_attention", lambda: _qkv(16, 1024, 8, 160), False),
    "S 1024, 8 x 96": ("spatial_attention", lambda: _qkv(16, 1024, 8, 96), False),
    "S 1024, 8 x 40": ("spatial_attention", lambda: _qkv(16, 1024, 8, 40), False),
    "S 256, 8 x 256": ("spatial_attention", lambda: _qkv(16, 256, 8, 256), False),
    "S 256, 8 x 64, float32": ("spatial_attention", lambda: _qkv(4, 256, 8, 64, dtype=_F32), False),
    "S 256, 8 x 128, float32": ("spatial_attention", lambda: _qkv(4, 256, 8, 128, dtype=_F32), False),
    "S 256, 8 x 256, float32": ("spatial_attention", lambda: _qkv(4, 256, 8, 256, dtype=_F32), False),
    "3D, 12 x 128, window, norm, rope": (
        "video_attention",
        lambda: {
            **_qkv(21, 1560, 12, 128),
            "mask": FrameMask.window(5),
            "norm": _norm(12, 12, 128, "rms", "all"),
            "rope": _rope(21, 1560, 128),
        },
        True,
    ),
    "3D, 12 x 128, teacher forcing": (
        "video_attention",
        lambda: {**_qkv(42, 1560, 12, 128), "mask": _forced(21), "norm": _norm(12, 12, 128, "rms", "all")},
        False,
    ),
    "3D, 12 x 128, shots": ("video_attention", lambda: {**_qkv(21, 1560, 12, 128), "mask": _SHOTS}, False),
    "3D, 24 x 128, text": (
        "video_attention",
        lambda: {**_qkv(16, 1560, 24, 128), "text": _text(256, 24, 128), "text_lengths": _int(1), "lengths": _int(1)},
        True,
    ),
    "3D, 30 x 64, text, causal": (
        "video_attention",
        lambda: {**_qkv(13, 1350, 30, 64), "text": _text(226, 30, 64), "mask": _CAUSAL, "text_sees": "text"},
        False,
    ),
    "3D, 30 x 64, text": (
        "video_attention",
        lambda: {**_qkv(13, 1350, 30, 64), "text": _text(226, 30, 64)},
        False,
    ),
    "windows, 4 x 128, text": (
        "video_attention",
        lambda: {
            **_qkv(8, 440, 4, 128),
            **_WINDOWS,
            "text": _text(226, 4, 128),
            "text_lengths": _int(1),
            "lengths": _int(1),
        },
        True,
    ),
    "windows, 4 x 72, text": (
        "video_attention",
        lambda: {**_qkv(8, 440, 4, 72), **_WINDOWS, "text": _text(226, 4, 72)},
        False,
    ),
    "windows, 4 x 64, text": (
        "video_attention",
        lambda: {**_qkv(8, 440, 4, 64), **_WINDOWS, "text": _text(226, 4, 64)},
        False,
    ),
    "windows, 4 x 128": ("video_attention", lambda: {**_qkv(8, 440, 4, 128), **_WINDOWS}, False),
    "windows, 4 x 72": ("video_attention", lambda: {**_qkv(8, 440, 4, 72), **_WINDOWS}, False),
    "windows, 4 x 64": ("video_attention", lambda: {**_qkv(8, 440, 4, 64), **_WINDOWS}, False),
    "windows, 4 x 128, float32": ("video_attention", lambda: {**_qkv(8, 440, 4, 128, dtype=_F32), **_WINDOWS}, False),
    "windows, 4 x 64, float32": ("video_attention", lambda: {**_qkv(8, 440, 4, 64, dtype=_F32), **_WINDOWS}, False),
    "tiles, 4 x 128": ("tile_attention", _tiles(4, 128, (1, 8, 8)), True),
    "tiles, ragged, 4 x 64": ("tile_attention", _tiles(4, 64, (3, 5, 7)), False),
    "cross, 12 x 128": (
        "cross_attention",
        lambda: {"q": _t(1, 21, 1560, 12, 128), "k": _t(1, 512, 12, 128), "v": _t(1, 512, 12, 128), "lengths": _int(1)},
        False,
    ),
    "gated, 16 x 72": ("gated_attention", lambda: _gated(16, 1024, 16, 72), True),
    "gated, 24 x 128, T 28, causal": ("gated_attention", lambda: _gated(28, 256, 24, 128, mask=_CAUSAL), False),
    "gated by channels, 24 x 128, T 28": ("gated_attention", lambda: _gated(28, 256, 24, 128, (128,)), False),
    "gated by channels, 16 x 72, causal": (
        "gated_attention",
        lambda: _gated(16, 256, 16, 72, (72,), mask=_CAUSAL),
        False,
    ),
    "gated by all, 24 x 128, T 60": ("gated_attention", lambda: _gated(60, 256, 24, 128, (1, 60, 256, 24, 128)), False),
    "gated, 8 x 64, T 240": ("gated_attention", lambda: _gated(240, 256, 8, 64), False),
    "norm, rope, 24 x 128": (
        "qk_norm_rope",
        lambda: {
            "q": _t(1, 16, 1560, 24, 128),
            "k": _t(1, 16, 1560, 24, 128),
            "norm": _norm(24, 24, 128),
            "rope": _rope(16, 1560, 128),
        },
        True,
    ),
    **{
        f"norm over {H} x {D}": ("qk_norm_rope", _norm_over(H, D), False)
        for H, D in ((16, 72), (24, 128), (40, 128), (48, 128))
    },
    **{f"modulate, {C} channels": ("modulate", _modulate(C), C == 3072) for C in (1152, 1536, 3072, 5120, 8192)},
    "gate_residual, 3072 channels": (
        "gate_residual",
        lambda: {"residual": _t(2, 4, 256, 3072), "x": _t(2, 4, 256, 3072), "gate": _t(2, 3072)},
        True,
    ),
    "patchify, 16 to 3072": (
        "patchify",
        lambda: {"video": _t(1, 16, 21, 60, 104), "weight": _t(3072, 16, 1, 2, 2), "bias": _t(3072)},
        True,
    ),
    "patchify, float32": (
        "patchify",
        lambda: {"video": _t(1, 4, 16, 32, 32, dtype=_F32), "weight": _t(1152, 4, 1, 2, 2, dtype=_F32)},
        False,
    ),
    "unpatchify, 3072 to 16": (
        "unpatchify",
        lambda: {
            "tokens": _t(1, 21, 1560, 3072),
            "weight": _t(64, 3072),
            "bias": _t(64),
            "channels": 16,
            "patch": (1, 2, 2),
            "grid": (21, 30, 52),
        },
        False,
    ),
}


def phases_of(job: Job, arch: str) -> dict[str, list[Launch]]:
    """What a benchmark's job on meta tensors would launch, by ``"fwd"`` and, where it has one, ``"bwd"``."""
    tensors = {name: _t(*size, dtype=job.dtype) for name, size in job.tensor_sizes.items()}
    if job.norm_rope and job.ROTATES:
        rope = job.rope_table()
        tensors |= {"cos": rope.cos, "sin": rope.sin}
    for name, x in tensors.items():
        x.requires_grad_(job.has_backward and name in job.learned)
    forward, backward = _launches_of(job.op, job.arguments(tensors), arch, backward=job.has_backward)
    return {"fwd": forward, "bwd": backward} if job.has_backward else {"fwd": forward}


def job_launches(job: Job, arch: str) -> list[Launch]:
    """The same, forward and backward in their order."""
    return [launch for launches in phases_of(job, arch).values() for launch in launches]


def _launches_of(
    op: str, args: dict[str, Any], arch: str, *, backward: bool = True
) -> tuple[list[Launch], list[Launch]]:
    """What forward and backward of a call on meta tensors would launch."""
    call: Call = capture(getattr(vdcore, op), **args)
    implementation = BACKENDS["triton"].operators[op]
    wanted = frozenset(n for n, x in zip(call.NAMES, call.tensors()) if x is not None and x.requires_grad)
    with torch.no_grad(), recording(arch) as launches:
        outputs = implementation.forward(call)
        n = len(launches)
        if backward:
            grads = tuple(None if x is None else torch.empty_like(x) for x in outputs)
            assert implementation.backward is not None
            implementation.backward(call, outputs, grads, wanted)
    return launches[:n], launches[n:]


def _tangent_launches(op: str, args: dict[str, Any], arch: str, names: Collection[str] = ()) -> list[Launch]:
    """What tangents of a call on meta tensors would launch: of the named tensors, or of all that can have one."""
    call: Call = capture(getattr(vdcore, op), **args)
    its = BACKENDS["triton"].operators[op]
    if its.tangents is None or its.why_not_tangents(call) is not None:
        return []
    with torch.no_grad(), recording(arch) as launches:
        outputs = tuple(x for x in call.empty_outputs() if x is not None)
        given = {
            name: torch.empty_like(x)
            for name, x in zip(call.NAMES, call.tensors())
            if x is not None and x.is_floating_point() and (not names or name in names)
        }
        if given:
            its.tangents(call, outputs, given)
    return launches


def collect(arch: str, *, few: bool = False, ops: Collection[str] = ()) -> list[tuple[str, Launch]]:
    """Every different (call, launch) on an architecture.

    Args:
        few: of the calls that every architecture is tried on.
        ops: of these operators alone; empty: of all.
    """
    found: dict[Any, tuple[str, Launch]] = {}
    for name, (op, build, everywhere) in CALLS.items():
        if (few and not everywhere) or (ops and op not in ops):
            continue
        launches = [*_launches_of(op, build(), arch), _tangent_launches(op, build(), arch)]
        if everywhere:
            launches.append(_tangent_launches(op, build(), arch, ("q",)))
        for launch in itertools.chain(*launches):
            found.setdefault(_identity(arch, launch), (f"{op}: {name}", launch))
    return list(found.values())


def _identity(arch: str, launch: Launch) -> Any:
    """What makes two launches run one compiled kernel, as far as it is known without compiling."""
    variables, constants = arguments_of(launch)
    kinds = tuple(x.dtype if isinstance(x, Tensor) else x is None for x in flat(variables))
    return arch, launch.kernel.__name__, launch.config, repr(constants), kinds


def arguments_of(launch: Launch) -> tuple[list[Any], list[Any]]:
    """What the kernel takes when it runs, and what it is compiled with, in the order of its parameters."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for parameter in launch.kernel.params:
        parts[parameter.is_constexpr].append(launch.arguments[parameter.name])
    return parts


def flat(arguments: Iterable[Any]) -> list[Any]:
    """What stands in nested tuples, in its order."""
    return [y for x in arguments for y in (flat(x) if isinstance(x, tuple) else (x,))]


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_([89]\d|1[0-2]\d)", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch must be such as {', '.join(ARCHS)}, got {arch!r}")


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel."""
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = _target(arch)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    given = {**launch.arguments, **launch.config.options(amd=arch.startswith("gfx"))}
    bound, specialization, options = bind(**given)
    options, signature, constexprs, attrs = launch.kernel._pack_args(backend, given, bound, specialization, options)
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return compile(source, target=target, options=options.__dict__)


def nvidia_tool(name: str) -> str:
    """The path of one of the toolkit's programs; Triton brings those that read machine code."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which(name) or str(folder / name)


def resources(kernel: Any, arch: str) -> tuple[int, int, int]:
    """Registers, bytes spilled, bytes of shared memory."""
    shared = kernel.metadata.shared
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(m.group(1)) if (m := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, 4 * spilled, shared
    tool = nvidia_tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(m.group(1)) for name in ("REG", "STACK", "LOCAL") if (m := re.search(rf"{name}:(\d+)", text))}
    return found["REG"], max(found["STACK"], found["LOCAL"]), shared


def _shared_limit(arch: str) -> int:
    return next((n for prefix, n in _SHARED.items() if arch.startswith(prefix)), 49_152)


def config_text(config: Any) -> str:
    """A config row's numbers."""
    parts = [f"{config.warps} warps", f"{config.stages} stages"]
    parts += [f"{f.name} {getattr(config, f.name)}" for f in fields(config) if f.name not in _COMMON]
    return ", ".join(parts)


_COMMON = ("arch", "warps", "stages", "why", "registers")
_jobs: list[tuple[str, str, Launch]] = []  # arch, call, launch: workers inherit them


def _record(i: int) -> Record:
    arch, call, launch = _jobs[i]
    begin = time.perf_counter()
    registers = spills = shared = 0
    problem = None
    try:
        registers, spills, shared = resources(compile_launch(launch, arch), arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        problem = f"it fails: {type(error).__name__}: {lines[-1]}"
    limit = _shared_limit(arch)
    if problem is None and spills:
        problem = f"it spills {spills} bytes"
    if problem is None and shared > limit:
        problem = f"it needs {shared} bytes of shared memory, and {arch} has {limit}"
    return Record(
        launch.kernel.__name__,
        arch,
        config_text(launch.config),
        call,
        registers=registers,
        spills=spills,
        shared=shared,
        seconds=round(time.perf_counter() - begin, 2),
        problem=problem,
    )


def compile_report(
    archs: Iterable[str] | None = None, *, few: bool = False, workers: int = 0, ops: Collection[str] = ()
) -> list[Record]:
    """Compiles every kernel with every config row, for the calls in :data:`CALLS`.

    Args:
        archs: such as ``"sm_90"`` or ``"gfx942"``; None: :data:`ARCHS`.
        few: only the calls that every architecture is tried on.
        workers: processes; 0: one for each core.
        ops: of these operators alone; empty: of all.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: under ``TRITON_INTERPRET=1``, where there is nothing to compile.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted with TRITON_INTERPRET=1, not compiled: unset it")
    archs = tuple(archs or ARCHS)
    for arch in archs:
        _target(arch)
    return compile_launches([(arch, *job) for arch in archs for job in collect(arch, few=few, ops=ops)], workers)


def compile_launches(wanted: Sequence[tuple[str, str, Launch]], workers: int = 0) -> list[Record]:
    """Compiles (arch, call, launch) in processes side by side, into Triton's cache; each kernel once.

    Args:
        workers: processes; 0: one for each core.
    """
    global _jobs
    _jobs = list({_identity(arch, launch): (arch, call, launch) for arch, call, launch in wanted}.values())
    workers = min(workers or os.cpu_count() or 1, len(_jobs))
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        return [_record(i) for i in range(len(_jobs))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_record, range(len(_jobs))))
