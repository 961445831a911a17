"""What compilers made of the benchmarks' kernels, read from machine code: a score that changes move without a GPU.

``vdcore doctor --compile --json``: an object per kernel, workload and variant, for Triton's kernels compiled ahead of
time, and for those of ``vdcore._cuda`` where it is built. Counts are of the code as it stands: a loop counts once.

The estimate is a model of a program (block) on an H200, whose multiprocessors copy 32.6 KB/us each: the program's
bytes at that rate, against its latency shared by the programs beside it (0.8 us a dependent trip to memory, 0.04 us a
barrier, 0.6 us to begin and end) and its issue slots (4 a cycle at 1.75 GHz, 70 % of them used); a grid's partial last
wave counts half. It is a share of what a copy reaches. Attention over frames is also held to 800 TFLOP/s, which says
little of it: its loops count once. Nothing of it is measured. Products that torch runs are not in it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcore import FrameMask
from vdcore_bench import aot
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import Job
from vdcore_bench.suites.gpu.plan import ITEMS
from vdcore_bench.workloads import load
from vdcore_kernels.core.launch import Launch

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# Of the models' own masks few are temporal: what masks cost shows here.
MASKED = (("mochi-1-480p", FrameMask.causal()), ("mochi-1-480p", FrameMask.window(8)))


@dataclass(frozen=True)
class Chip:
    """Of a multiprocessor: bytes of shared memory for all programs, warps and programs at most."""

    shared: int
    warps: int
    programs: int


_LARGE, _SMALL = Chip(233_472, 64, 32), Chip(102_400, 48, 24)
CHIPS = {"sm_80": Chip(167_936, 64, 32), "sm_86": _SMALL, "sm_89": _SMALL, "sm_9": _LARGE, "sm_10": _LARGE}
CHIPS |= {"sm_12": _SMALL}
REGISTERS = 65_536  # of a multiprocessor; a warp takes them in steps of 256
RESERVED = 1024  # bytes of shared memory of each program

# Of the model.
PROCESSORS, BYTES_A_US, PEAK_A_US = 132, 32.6e3, 800e6 / 132
TRIP, BARRIER, BEGIN = 0.8, 0.04, 0.6  # us
SLOTS_A_US = 4 * 1.75e3 * 0.7
COPY = 0.92  # of the bandwidth: what a copy of this kind reaches


# ---- Machine code ----


@dataclass(frozen=True)
class Code:
    """What one kernel's instructions say.

    Args:
        order: loads from memory L, asynchronous ones A, barriers B, in their order.
        widths: bytes a thread of the loads before the first barrier.
        copies: bytes of asynchronous copies.
        mma: matrix instructions.
    """

    order: str
    widths: tuple[int, ...]
    copies: tuple[int, ...]
    mma: int
    instructions: int

    @property
    def trips(self) -> int:
        """Loads that wait for one another: groups with a barrier between them."""
        return len(re.findall(r"[LA]+", self.order))


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_MATRIX = ("HMMA", "HGMMA", "IMMA", "QMMA", "QGMMA", "OMMA", "UTCHMMA", "UTCQMMA")


def _width(opcode: str) -> int:
    """Bytes a thread of a load: LDG.E.128, LDG.E.U16, LDG.E."""
    for part in opcode.split(".")[::-1]:
        if match := re.fullmatch(r"[US]?(8|16|32|64|128|256)", part):
            return int(match.group(1)) // 8
    return 4


def code_of(sass: str) -> Code:
    """Of the text that nvdisasm or cuobjdump prints of one kernel."""
    opcodes = _INSTRUCTION.findall(sass)
    order, widths, copies, mma = "", [], [], 0
    for opcode in opcodes:
        name = opcode.partition(".")[0]
        if name == "LDG":
            widths += [_width(opcode)] if "B" not in order else []
            order += "L"
        elif name in ("LDGSTS", "UTMALDG", "UBLKCP"):
            copies.append(_width(opcode) if name == "LDGSTS" else 16)
            order += "A"
        elif name == "BAR" and opcode.startswith("BAR.SYNC"):
            order += "B"
        mma += name in _MATRIX
    return Code(order, tuple(widths), tuple(copies), mma, len(opcodes))


def ctas_per_sm(arch: str, regs: int, warps: int, shared: int) -> int:
    """Programs of a multiprocessor at a time."""
    chip = next((chip for prefix, chip in CHIPS.items() if arch.startswith(prefix)), _LARGE)
    a_warp = max(-(-regs // 8) * 8, 24) * 32
    return min(REGISTERS // (a_warp * warps), chip.shared // (shared + RESERVED), chip.programs, chip.warps // warps)


def estimate(raw: dict[str, Any], code: Code, programs: int, size: float, flops: float) -> tuple[float, str]:
    """The model's share, and what the kernel is bound by; ``size``, ``flops``: of all programs."""
    if not raw["ctas_per_sm"]:
        return 0.0, "shared memory"
    times = {
        "bandwidth": size / programs / BYTES_A_US,
        "latency": (code.trips * TRIP + raw["barriers"] * BARRIER + BEGIN) / raw["ctas_per_sm"],
        "issue": code.instructions * raw["warps"] / SLOTS_A_US,
    }
    if code.mma and flops:
        times["compute"] = flops / programs / PEAK_A_US
    slowest = max(times, key=lambda name: times[name])
    waves = programs / (PROCESSORS * raw["ctas_per_sm"])
    full = (waves / -(-waves // 1) + 1) / 2 if waves < 6 else 1.0
    needed = max(times["bandwidth"], times.get("compute", 0.0))
    return round(min(COPY * needed / times[slowest] * full, 1.0), 3), slowest


def raw_fields(arch: str, code: Code, regs: int, spills: int, shared: int, warps: int) -> dict[str, Any]:
    """The fields that are counted, not modelled."""
    ctas = ctas_per_sm(arch, regs, warps, shared)
    width = Counter(code.widths).most_common(1)[0][0] if code.widths else 0
    return {
        "regs": regs,
        "spills": spills,
        "shared": shared,
        "ctas_per_sm": ctas,
        "warps": warps,
        "loads_before_barrier": len(code.widths),
        "load_bytes": width,
        "bytes_in_flight": ctas * warps * 32 * len(code.widths) * width,
        "barriers": code.order.count("B"),
        "async_copy_bytes": min(code.copies, default=0),
        "mma": code.mma,
    }


# ---- Triton ----


def variant_of(job: Job) -> str:
    """plain, norm+rope, causal, window, chunks, or several of them."""
    mask, parts = job.mask, []
    if mask != FrameMask.full():
        bounded = mask.past is not None and mask.past >= 0
        parts = ["window" if bounded else "chunks" if mask.chunk > 1 else "causal"]
    return "+".join([*parts, *(["norm+rope"] if job.norm_rope else [])]) or "plain"


def jobs() -> Iterator[Job]:
    """The benchmarks' jobs on their models' own shapes, and masks of temporal attention; with a backward."""
    wanted = {(item.op, item.workload, item.norm_rope): None for item in ITEMS}
    options: dict[str, Any] = {"mode": "fwd+bwd", "dtype": torch.bfloat16, "device": "meta"}
    for op, workload, norm_rope in wanted:
        yield make(op, load()[workload], norm_rope=norm_rope, **options)
    for workload, mask in MASKED:
        yield make("temporal_attention", load()[workload], mask=mask, **options)


@dataclass(frozen=True)
class Wanted:
    """One kernel of a job."""

    job: Job
    mode: str
    arch: str
    launch: Launch

    @property
    def size(self) -> float:
        """Bytes of the tensors that it is given, each once: what it moves at least."""
        tensors = {id(x): x for x in aot.flat(self.launch.arguments.values()) if isinstance(x, Tensor)}
        return float(sum(x.numel() * x.element_size() for x in tensors.values()))

    @property
    def flops(self) -> float:
        """0 for what is bound by bytes, whatever it multiplies."""
        if not re.match("frame_attention", self.launch.kernel.__name__):
            return 0.0
        return self.job.forward_flops() if self.mode == "fwd" else self.job.backward_flops()


def wanted_kernels(archs: Sequence[str]) -> list[Wanted]:
    """Every kernel, workload and variant on every architecture, each once."""
    found: dict[Any, Wanted] = {}
    for arch in archs:
        for job in jobs():
            for mode, launches in aot.phases_of(job, arch).items():
                for launch in launches:
                    key = (
                        arch,
                        job.op,
                        job.workload.name,
                        variant_of(job),
                        mode,
                        launch.kernel.__name__,
                        launch.config,
                    )
                    found.setdefault(key, Wanted(job, mode, arch, launch))
    return list(found.values())


_wanted: list[Wanted] = []  # workers inherit them


def _row(i: int) -> dict[str, Any]:
    w = _wanted[i]
    row: dict[str, Any] = {"op": w.job.op, "mode": w.mode, "backend": "triton", "dtype": "bfloat16"}
    row |= {"variant": variant_of(w.job), "workload": w.job.workload.name, "kernel": w.launch.kernel.__name__}
    row |= {"arch": w.arch, "auto": True}
    try:
        kernel = aot.compile_launch(w.launch, w.arch)
        regs, spills, shared = aot.resources(kernel, w.arch)
        code = code_of(_disassembled(kernel.asm["cubin"]))
    except Exception as error:
        nothing = raw_fields(w.arch, code_of(""), 0, 0, 0, w.launch.config.warps)
        lines = str(error).strip().splitlines() or [""]
        return {**row, **nothing, "estimate": 0, "bound_by": f"it fails: {type(error).__name__}: {lines[-1][:200]}"}
    row |= raw_fields(w.arch, code, regs, spills, shared, w.launch.config.warps)
    share, bound = estimate(row, code, w.launch.programs, w.size, w.flops)
    return {**row, "estimate": share, "bound_by": bound}


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [aot.nvidia_tool("cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- vdcore._cuda ----

_NAMES = (
    (r"frame_attention", "video_attention"),
    (r"temporal", "temporal_attention"),
    (r"gated|spatial", "gated_attention"),
    (r"norm_rope|rope_table", "qk_norm_rope"),
)


def cuda_rows(module: Path, archs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of every kernel in a compiled module; shapes are known when it runs: no workload, no estimate."""
    tool, known = aot.nvidia_tool("cuobjdump"), _architectures(module)
    for arch in archs:
        built = next((name for name in known if name.rstrip("a") == arch), None)
        if built is None:
            continue

        def said(option: str, arch: str = built) -> str:
            command = [tool, "-arch", arch, option, str(module)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = {
            name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", text)}
            for name, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", said("-res-usage"))
        }
        for text in said("-sass").split("Function : ")[1:]:
            name = text.split("\n", 1)[0].strip()
            if name in usage:
                yield _cuda_row(name, arch, usage[name], text)


def _cuda_row(name: str, arch: str, usage: dict[str, int], text: str) -> dict[str, Any]:
    """Warps of a block are its launch's; four is what most of them have."""
    op = next((op for pattern, op in _NAMES if re.search(pattern, name)), "")
    row: dict[str, Any] = {"op": op, "mode": "bwd" if re.search("backward|bwd", name) else "fwd", "backend": "cuda"}
    row |= {"dtype": "bfloat16" if "bf16" in name else "float16", "variant": "plain", "workload": ""}
    row |= {"kernel": name, "arch": arch, "auto": False}
    spills = usage.get("STACK", 0) + usage.get("LOCAL", 0)
    row |= raw_fields(arch, code_of(text), usage["REG"], spills, usage.get("SHARED", 0), 4)
    return {**row, "estimate": 0, "bound_by": ""}


def _architectures(module: Path) -> list[str]:
    command = [aot.nvidia_tool("cuobjdump"), "-lelf", str(module)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\.(sm_\d+a?)\.", said)))


# ---- All of it ----


def report(archs: Sequence[str] | None = None, workers: int = 0) -> list[dict[str, Any]]:
    """The rows of ``vdcore doctor --compile --json``; progress goes to stderr.

    Args:
        archs: such as ``"sm_90"``; None: :data:`ARCHS`.
        workers: processes; 0: one for each core.

    Raises:
        ValueError: an unknown architecture, or one that is not NVIDIA's.
        RuntimeError: under ``TRITON_INTERPRET=1``, where there is nothing to compile.
    """
    global _wanted
    import triton

    archs = tuple(archs or ARCHS)
    for arch in archs:
        if not re.fullmatch(r"sm_\d{2,3}", arch):
            raise ValueError(f"arch must be such as {', '.join(ARCHS)}, got {arch!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted with TRITON_INTERPRET=1, not compiled: unset it")
    _wanted = wanted_kernels(archs)
    rows = []
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, multiprocessing.get_context("fork")) as pool:
        for number, row in enumerate(pool.map(_row, range(len(_wanted)))):
            what = f"{row['arch']} {row['kernel']}, {row['workload']}, {row['variant']}"
            print(f"{number + 1} of {len(_wanted)}: {what}", file=sys.stderr, flush=True)
            rows.append(row)
    spec = importlib.util.find_spec("vdcore._cuda")
    if spec is None or spec.origin is None:
        print("vdcore._cuda is not built: its kernels are left out (make cuda)", file=sys.stderr)
        return rows
    return rows + list(cuda_rows(Path(spec.origin), archs))
