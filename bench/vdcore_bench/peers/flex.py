"""torch's FlexAttention, with block masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Function, Makers, compiled, masked, norm_rope, text_tokens, unit, whole_job
from vdcore_bench.peers.registry import ATTENTION, peer


def _why_not(job: Job) -> str | None:
    if torch.device(job.device).type == "cpu" and job.has_backward:
        return "FlexAttention has no backward on the CPU"
    return None


@peer("flex", ATTENTION, why_not=_why_not, slow_start=True)
def flex(job: Job) -> Makers:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def block_mask() -> Any:
        if not masked(job):
            return None
        mask, tokens, video = job.mask, unit(job), job.shape.T * unit(job)
        text = text_tokens(job)
        seen = mask.visible(job.shape.T).to(job.device)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            frames = (x.clamp(max=video - 1) // tokens for x in (i, j))
            return (i >= video) | (j >= video) | seen[tuple(frames)]

        n = video + text
        return create_block_mask(visible, None, None, n, n, device=job.device)

    def make() -> Function:
        call, blocks = compiled(flex_attention), block_mask()

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            gqa = q.shape[2] != k.shape[2]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return call(q, k, v, block_mask=blocks, scale=scale, enable_gqa=gqa).transpose(1, 2)

        # Compiled apart: in one graph with norm and rope, Inductor fails to lower FlexAttention on the CPU.
        return whole_job(job.op, attend, compiled(norm_rope) if job.norm_rope else norm_rope)

    return {"compiled": make}
