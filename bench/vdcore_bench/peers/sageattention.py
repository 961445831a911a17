"""SageAttention."""

from __future__ import annotations

from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, dense_only
from vdcore_bench.peers.registry import ATTENTION, library, peer


@peer("sageattention", ATTENTION, why_not=library("sageattention", backward=False), module="sageattention")
def sageattention(job: Job) -> Makers:
    from sageattention import sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)

    return dense_only(job, attend)
