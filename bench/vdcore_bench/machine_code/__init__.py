"""What compilers made of the benchmarks' kernels, read from machine code: a score that changes move without a GPU.

``vdcore doctor --compile --json``: an object per kernel, workload and variant, for Triton's kernels compiled ahead of
time, and for those of ``vdcore._cuda`` where it is built. Counts are of the code as it stands: a loop counts once, and
what only a branch reaches that a CUDA kernel marks as rare (`rare()`) not at all: a sum that holds a NaN.
Beside the counts stand what the model takes: ``programs`` of the launch, ``bytes`` of its tensors, ``flops`` of its
products, ``trips`` to memory that wait for one another, and ``instructions``.

The estimate is a model of a program (block) on an H200, whose multiprocessors copy 32.6 KB/us each: the program's
bytes at that rate, against its latency shared by the programs beside it (0.8 us a dependent trip to memory, 0.04 us a
barrier, 0.6 us to begin and end) and its issue slots (4 a cycle at 1.75 GHz, 70 % of them used); a grid's partial last
wave counts half. It is a share of what a copy reaches. Beside it stands ``flops_estimate``, with the FLOPs of attention
over frames held to 800 TFLOP/s too: where ``flops_bound_by`` is compute, a share of that peak, which says little of
kernels whose loops count once. Nothing of it is measured. Products that torch runs are not in it.

Rows of dense attention over a video, of windows and of lists say also what a visible pair takes, ``pair_ps``, so that
they can be compared: tiles of pairs that all queries see, and tiles that are tested or cut off, are counted in the
tables that the kernel walks through, and each takes as long as its products at their peak or, if that is more, as its
loop's instructions.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vdcore_bench.machine_code import cuda, triton
from vdcore_bench.machine_code.code import Code, code_of, ctas_per_sm, estimate, filled, known
from vdcore_bench.machine_code.wanted import jobs, variant_of

__all__ = ["ARCHS", "Code", "code_of", "ctas_per_sm", "estimate", "filled", "jobs", "report", "variant_of"]

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


def report(archs: Sequence[str] | None = None, workers: int = 0, ops: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows of ``vdcore doctor --compile --json``; progress goes to stderr.

    Args:
        archs: such as ``"sm_90"``; None: :data:`ARCHS`.
        workers: processes; 0: one for each core.
        ops: rows of these operators alone; empty: of all.

    Raises:
        ValueError: an unknown architecture, or one that is not NVIDIA's.
        RuntimeError: under ``TRITON_INTERPRET=1``, where there is nothing to compile.
    """
    from triton import knobs

    archs = tuple(archs or ARCHS)
    for arch in archs:
        if not known(arch):
            raise ValueError(f"arch must be NVIDIA's from sm_80 on, such as {', '.join(ARCHS)}, got {arch!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted with TRITON_INTERPRET=1, not compiled: unset it")
    known_ops = {job.op for job in jobs()}
    if not known_ops.issuperset(ops):
        raise ValueError(f"op must be of {', '.join(sorted(known_ops))}, got {', '.join(sorted(ops))}")
    rows = triton.rows(archs, workers, ops)
    spec = importlib.util.find_spec("vdcore._cuda")
    if spec is None or spec.origin is None:
        print("vdcore._cuda is not built: its kernels are left out (make cuda)", file=sys.stderr)
        return rows
    return rows + cuda.rows(Path(spec.origin), archs, workers, ops)
