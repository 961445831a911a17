"""Triton's kernels, compiled ahead of time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdcore_bench import aot
from vdcore_bench.jobs.base import Job
from vdcore_bench.machine_code.code import Row, by_pairs, code_of, failed, filled
from vdcore_bench.machine_code.sparse import walk_of
from vdcore_bench.machine_code.wanted import described, jobs, variant_of
from vdcore_kernels.core.launch import Launch


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


def wanted_kernels(archs: Sequence[str], ops: Collection[str] = ()) -> list[Wanted]:
    """Every kernel, workload and variant on every architecture, each once; ``ops``: of these operators alone."""
    found: dict[Any, Wanted] = {}
    for arch in archs:
        for job in jobs(ops):
            what = (arch, job.op, job.workload.name, variant_of(job))
            for mode, launches in aot.phases_of(job, arch).items():
                for launch in launches:
                    key = (*what, mode, launch.kernel.__name__, launch.config)
                    found.setdefault(key, Wanted(job, mode, arch, launch))
    return list(found.values())


_wanted: list[Wanted] = []  # workers inherit them


def _row(i: int) -> Row:
    w = _wanted[i]
    warps, name = w.launch.config.warps, w.launch.kernel.__name__
    row = described(w.job, w.mode, "triton", name, arch=w.arch, programs=w.launch.programs, size=w.size)
    try:
        kernel = aot.compile_launch(w.launch, w.arch)
        regs, spills, shared = aot.resources(kernel, w.arch)
        code = code_of(disassembled(kernel.asm["cubin"]))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return failed(row, warps, f"{type(error).__name__}: {lines[-1][:200]}")
    row = filled(row, code, regs=regs, spills=spills, shared=shared, warps=warps)
    walk = walk_of(w.job, w.launch)
    return row if walk is None else by_pairs(row, code, walk, w.job)


def disassembled(cubin: bytes) -> str:
    """A kernel's machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [aot.nvidia_tool("cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows(archs: Sequence[str], workers: int = 0, ops: Collection[str] = ()) -> list[Row]:
    """Compiles in processes side by side; 0: one for each core."""
    global _wanted
    _wanted = wanted_kernels(archs, ops)
    found = []
    # A fork has none of the threads that torch here may have begun to share work with, and would wait for them.
    alone: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, multiprocessing.get_context("fork"), **alone) as pool:
        for number, row in enumerate(pool.map(_row, range(len(_wanted)))):
            what = f"{row['arch']} {row['kernel']}, {row['workload']}, {row['variant']}"
            print(f"{number + 1} of {len(_wanted)}: {what}", file=sys.stderr, flush=True)
            found.append(row)
    return found
