"""The kernels that are looked at: those of the benchmarks' jobs, masks of temporal attention, windows and lists."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from vdcore import FrameMask
from vdcore.ops.choose import ORDER
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import Job
from vdcore_bench.machine_code import sparse
from vdcore_bench.machine_code.code import Row
from vdcore_bench.suites.gpu.plan import ITEMS
from vdcore_bench.workloads import load

# Wan's norm is over all heads, which some kernels do not have.
MORE = (("qk_norm_rope", "hunyuanvideo-720p"),)
# Of the models' own masks few are temporal: what masks cost shows here.
MASKED = (("mochi-1-480p", FrameMask.causal()), ("mochi-1-480p", FrameMask.window(8)))


def variant_of(job: Job) -> str:
    """plain, norm+rope, causal, window, chunks, or several of them; tokens, tiles, radial or lists of a grid's."""
    if (found := sparse.variant_of(job)) is not None:
        return found
    mask, parts = job.mask, []
    if mask != FrameMask.full():
        bounded = mask.past is not None and mask.past >= 0
        parts = ["window" if bounded else "chunks" if mask.chunk > 1 else "causal"]
    return "+".join([*parts, *(["norm+rope"] if job.norm_rope else [])]) or "plain"


def jobs(ops: Collection[str] = ()) -> Iterator[Job]:
    """The benchmarks' jobs on their models' own shapes, masks of temporal attention, windows, lists; with a backward.

    ``ops``: of these operators alone; empty: of all.
    """
    return (job for job in _jobs() if not ops or job.op in ops)


def _jobs() -> Iterator[Job]:
    wanted = {(item.op, item.workload, item.norm_rope): None for item in ITEMS}
    options: dict[str, Any] = {"mode": "fwd+bwd", "dtype": torch.bfloat16, "device": "meta"}
    for op, workload, norm_rope in wanted:
        yield make(op, load()[workload], norm_rope=norm_rope, **options)
    for op, workload in MORE:
        yield make(op, load()[workload], **options)
    for workload, mask in MASKED:
        yield make("temporal_attention", load()[workload], mask=mask, **options)
    yield from sparse.jobs(options)


def described(job: Job, mode: str, backend: str, kernel: str, *, arch: str, programs: int, size: float) -> Row:
    """What is known of a row before its code is read; ``size``: bytes of its tensors."""
    flops = 0.0  # what is bound by bytes is, whatever it multiplies
    if kernel.startswith(("frame_attention", "tile_attention")):
        flops = job.forward_flops() if mode == "fwd" else job.backward_flops()
    row: Row = {"op": job.op, "mode": mode, "backend": backend, "dtype": "bfloat16", "variant": variant_of(job)}
    # The backend that `auto` tries first of the two can run all of these.
    first = next(name for name in ORDER["cuda"] if name in ("triton", "cuda"))
    row |= {"workload": job.workload.name, "kernel": kernel, "arch": arch, "auto": backend == first}
    return row | {"programs": programs, "bytes": int(size), "flops": int(flops)}
