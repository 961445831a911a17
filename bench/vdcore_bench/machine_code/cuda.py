"""The kernels of ``vdcore._cuda``: what calls would launch, by the launchers' own plans, and their machine code.

An architecture has the code of its family in the module, as hardware takes it: that of sm_80 is sm_89's too. Where
there is none, the module's PTX is compiled by ptxas, as a driver does it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.ops import cuda
from vdcore.ops.call import Call
from vdcore.ops.choose import BACKENDS
from vdcore.ops.cuda import Launch
from vdcore.ops.operator import capture
from vdcore_bench.aot import nvidia_tool
from vdcore_bench.jobs.base import Job
from vdcore_bench.machine_code.code import PROCESSORS, RESERVED, Row, chip_of, code_of, failed, filled
from vdcore_bench.machine_code.wanted import described, jobs, variant_of


@dataclass(frozen=True)
class Wanted:
    """One kernel of a job, by its short name."""

    job: Job
    mode: str
    arch: str
    kernel: str
    launch: Launch

    def row(self) -> Row:
        one = self.launch
        return described(
            self.job, self.mode, "cuda", self.kernel, arch=self.arch, programs=one.blocks, size=float(one.bytes)
        )


# ---- What is launched ----


def short_name(kernel: str) -> str:
    """``"f<bf16, 2>"`` of ``"void vdcore::cuda::f<vdcore::cuda::bf16, 2>(A)"``, as C++ and as nvcc write it."""
    name = re.sub(r"_GLOBAL__N_\w+::|\(anonymous namespace\)::|vdcore::cuda::|^void ", "", kernel)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def _call_of(job: Job) -> Call:
    """The job's call on tensors of the CPU that nobody has touched: memory that is never there."""
    tensors = {name: torch.empty(size, dtype=job.dtype) for name, size in job.tensor_sizes.items()}
    if job.norm_rope and job.ROTATES:
        rope = job.rope_table()
        tensors |= {"cos": torch.empty(rope.cos.shape), "sin": torch.empty(rope.sin.shape)}
    for name, x in tensors.items():
        x.requires_grad_(job.has_backward and name in job.learned)
    call: Call = capture(getattr(vdcore, job.op), **job.arguments(tensors))
    return call


def phases_of(job: Job, arch: str) -> dict[str, list[Launch]]:
    """What the job would launch, by ``"fwd"`` and ``"bwd"``; nothing where the kernels do not serve it."""
    implementation = BACKENDS["cuda"].operators.get(job.op)
    if implementation is None:
        return {}
    call, chip = _call_of(job), chip_of(arch)
    number = int(arch.removeprefix("sm_"))
    record = partial(cuda.recording, divmod(number, 10), multiprocessors=PROCESSORS, shared=chip.most)
    with torch.no_grad(), record() as forward:
        if implementation.why_not(call) is not None:
            return {}
        outputs = implementation.forward(call)
    with torch.no_grad(), record() as backward:
        if implementation.backward is not None and implementation.why_not_backward(call) is None and job.has_backward:
            grads = tuple(None if x is None else torch.empty_like(x) for x in outputs)
            named: Iterable[tuple[str, Tensor | None]] = zip(call.NAMES, call.tensors())
            wanted = frozenset(name for name, x in named if x is not None and x.requires_grad)
            implementation.backward(call, outputs, grads, wanted)
    return {"fwd": forward, "bwd": backward}


def wanted_kernels(arch: str, ops: Collection[str] = ()) -> list[Wanted]:
    """Every kernel, workload and variant, each once; ``ops``: of these operators alone."""
    found: dict[Any, Wanted] = {}
    for job in jobs(ops):
        for mode, launches in phases_of(job, arch).items():
            for launch in launches:
                name = short_name(launch.kernel)
                key = (job.op, job.workload.name, variant_of(job), mode, name)
                found.setdefault(key, Wanted(job, mode, arch, name, launch))
    return list(found.values())


# ---- Their code ----


@dataclass(frozen=True)
class Compiled:
    """One kernel as ``cuobjdump`` prints it."""

    usage: dict[str, int]
    sass: str


def _said(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["nothing was said"])[0]
        first = re.sub(r"^.*, line \d+; ", "", first)  # of a temporary file
        raise RuntimeError(f"{Path(str(command[0])).name}: {first.strip()[:200]}")
    return done.stdout


def _read(file: Path, names: frozenset[str], *options: str) -> dict[str, Compiled]:
    """The kernels of these short names in a module or cubin."""
    tool, usage = nvidia_tool("cuobjdump"), {}
    for mangled, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _said(tool, *options, "-res-usage", file)):
        name = short_name(cuda.kernels().demangled(mangled))
        if name in names:
            usage[mangled] = name, {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", text)}
    if not usage:
        return {}
    found = {}
    for text in _said(tool, *options, "-sass", "-fun", ",".join(usage), file).split("Function : ")[1:]:
        mangled = text.split("\n", 1)[0].strip()
        if mangled in usage:
            name, counts = usage[mangled]
            found[name] = Compiled(counts, text)
    return found


def _architectures(module: Path) -> list[str]:
    return sorted(set(re.findall(r"\.(sm_\d+a?)\.", _said(nvidia_tool("cuobjdump"), "-lelf", module))))


def _fits(built: str, arch: str) -> bool:
    """Whether hardware of an architecture takes code of another one: the same or an older one of its family."""
    if built.endswith("a"):
        return built[:-1] == arch
    old, new = (int(name.removeprefix("sm_")) for name in (built, arch))
    return old // 10 == new // 10 and old <= new


def _from_ptx(module: Path, arch: str, names: frozenset[str], workers: int) -> dict[str, Compiled]:
    """By ptxas, for these kernels alone; files of the module side by side."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([nvidia_tool("cuobjdump"), "-xptx", "all", module.resolve()], cwd=folder, capture_output=True)

        def compiled(ptx: Path) -> dict[str, Compiled]:
            entries = re.findall(r"\.entry (\w+)", ptx.read_text())
            entries = [name for name in entries if short_name(cuda.kernels().demangled(name)) in names]
            if not entries:
                return {}
            cubin = ptx.with_suffix(".cubin")
            given = [option for name in entries for option in ("-e", name)]
            _said(nvidia_tool("ptxas"), f"-arch={arch}", *given, "-o", cubin, ptx)
            return _read(cubin, names)

        with ThreadPoolExecutor(workers or 2) as pool:
            found = pool.map(compiled, sorted(Path(folder).glob("*.ptx")))
            return {name: code for part in found for name, code in part.items()}


def code_on(arch: str, module: Path, names: frozenset[str], workers: int = 0) -> dict[str, Compiled]:
    """The code of these kernels that hardware of the architecture runs, by their short names."""
    built = [name for name in _architectures(module) if _fits(name, arch)]
    found: dict[str, Compiled] = {}
    for name in sorted(built, key=lambda name: int(re.sub(r"\D", "", name))):  # the newest last
        found |= _read(module, names, "-arch", name)
    return found if built else _from_ptx(module, arch, names, workers)


# ---- Rows ----


def _row(wanted: Wanted, code: dict[str, Compiled], problem: str) -> Row:
    row, launch = wanted.row(), wanted.launch
    compiled = code.get(wanted.kernel)
    warps = -(-launch.threads // 32)
    if compiled is None:
        return failed(row, warps, problem or f"the module has no code of it for {wanted.arch}")
    usage = compiled.usage
    spills = usage.get("STACK", 0) + usage.get("LOCAL", 0)
    # From sm_90 on, what the system has of a block's shared memory is counted with it.
    static = usage.get("SHARED", 0) - (RESERVED if int(wanted.arch.removeprefix("sm_")) >= 90 else 0)
    shared = max(static, 0) + launch.shared
    return filled(row, code_of(compiled.sass), regs=usage["REG"], spills=spills, shared=shared, warps=warps)


def rows(module: Path, archs: Sequence[str], workers: int = 0, ops: Collection[str] = ()) -> list[Row]:
    """Of every kernel that the benchmarks' jobs launch."""
    found = []
    for arch in archs:
        wanted = wanted_kernels(arch, ops)
        print(f"{arch}: {len(wanted)} kernels of {module.name}", file=sys.stderr, flush=True)
        code, problem = {}, ""
        try:
            code = code_on(arch, module, frozenset(one.kernel for one in wanted), workers)
        except RuntimeError as error:
            problem = str(error)
        found += [_row(one, code, problem) for one in wanted]
    return found
