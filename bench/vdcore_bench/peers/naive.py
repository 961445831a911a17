"""Attention as its formula says it, with all scores in memory."""

from __future__ import annotations

import math

from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Attend, Makers, dense_mask, in_float32, materialized, narrow, whole_job
from vdcore_bench.peers.registry import ATTENTION, peer


def _attend(job: Job) -> Attend:
    seen = dense_mask(job)
    hidden = None if seen is None else ~seen
    del seen

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return attend


@peer("naive", ATTENTION, workspace=materialized)
def naive(job: Job) -> Makers:
    found: Makers = {"eager": lambda: whole_job(job.op, _attend(job))}
    if narrow(job):
        found["in float32"] = lambda: whole_job(job.op, in_float32(_attend(job)))
    return found
