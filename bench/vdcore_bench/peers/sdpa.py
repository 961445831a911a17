"""torch's scaled_dot_product_attention, on each of its backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import (
    Attend,
    Function,
    Makers,
    compiled,
    dense_mask,
    in_float32,
    masked,
    materialized,
    narrow,
    run_by_run,
    sample_by_sample,
    text_tokens,
    whole_job,
)
from vdcore_bench.peers.registry import ATTENTION, peer


def _call(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)


def _views(backend: SDPBackend, mask: Tensor | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _call(backend, q, k, v, scale, mask).transpose(1, 2)

    return attend


def _copies(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return _call(backend, q, k, v, scale, None).transpose(1, 2)

    return attend


def _variants(backend: SDPBackend, job: Job) -> Makers:
    views, copies = _views(backend), _copies(backend)

    def strided() -> Function:
        return whole_job(job.op, _views(backend, dense_mask(job)))

    found: Makers = {}
    if masked(job):
        if not text_tokens(job) and job.grid_mask is None:
            found["one call a run"] = lambda: whole_job(job.op, run_by_run(views, job))
        if backend != SDPBackend.FLASH_ATTENTION or job.device == "cpu":
            found["dense mask"] = strided
        return found
    found["strided"] = strided
    if backend == SDPBackend.MATH:  # seldom the fastest, but its backward is, compiled, in float32 on a CPU
        if job.op == "temporal_attention" and job.has_backward and not narrow(job):
            found["compiled"] = lambda: compiled(strided())
        return found
    if job.op == "temporal_attention" and job.shape.B > 1:
        found["one call a sample"] = lambda: sample_by_sample(job.op, views)
    found["permuted copies"] = lambda: whole_job(job.op, copies)
    # Compiling takes seconds each, so only where there is something to fuse, or where it has been the fastest.
    if not (narrow(job) and job.has_backward):
        found["compiled"] = lambda: compiled(strided())
    if narrow(job):
        widened = whole_job(job.op, in_float32(views))
        found["in float32"] = lambda: widened
        found["in float32, permuted copies"] = lambda: whole_job(job.op, in_float32(copies))
        if job.norm_rope or job.has_backward:
            found["in float32, compiled"] = lambda: compiled(widened)
    return found


def _register(name: str, backend: SDPBackend, *devices: str) -> None:
    def why_not(job: Job) -> str | None:
        device = torch.device(job.device).type
        return None if device in devices else f"torch has it on {' and '.join(devices)} only"

    def workspace(job: Job) -> int:
        return materialized(job) if backend == SDPBackend.MATH else 0

    register = peer(f"sdpa[{name}]", ATTENTION, why_not=why_not, workspace=workspace)
    register(lambda job: _variants(backend, job))


_register("flash", SDPBackend.FLASH_ATTENTION, "cpu", "cuda")
_register("cudnn", SDPBackend.CUDNN_ATTENTION, "cuda")
_register("efficient", SDPBackend.EFFICIENT_ATTENTION, "cuda")
_register("math", SDPBackend.MATH, "cpu", "cuda")
