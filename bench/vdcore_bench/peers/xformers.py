"""xFormers' memory_efficient_attention."""

from __future__ import annotations

from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, dense_only
from vdcore_bench.peers.registry import ATTENTION, library, peer


@peer("xformers", ATTENTION, why_not=library("xformers", needs_half=False), module="xformers")
def xformers(job: Job) -> Makers:
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (x if x.shape[2] == q.shape[2] else x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return memory_efficient_attention(q, k, v, scale=scale)

    return dense_only(job, attend)
