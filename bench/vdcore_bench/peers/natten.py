"""NATTEN, whose windows of positions are frames here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore import FrameMask
from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, masked, norm_rope, text_tokens
from vdcore_bench.peers.registry import library, peer


def _why_not(job: Job) -> str | None:
    reason = library("natten", needs_half=False)(job)
    if reason is not None:
        return reason
    mask = job.mask
    if masked(job) and (mask.future != 0 or mask.chunk > 1 or mask.sink or (mask.past or 0) >= job.shape.T):
        return "its windows are causal windows of frames, without chunks and sinks"
    if text_tokens(job) or job.shape.G != job.shape.H:
        return "it has neither text nor grouped heads"
    return None


@peer("natten", ("video_attention",), why_not=_why_not, module="natten")
def natten(job: Job) -> Makers:
    from natten import na3d

    s, mask = job.shape, job.mask
    frames = s.T if mask.past is None else mask.past + 1

    def attention(q: Tensor, k: Any = None, v: Any = None, *, norm: Any, rope: Any, mask: FrameMask) -> Tensor:
        q, k, v = (q, k, v) if k is not None else q.unbind(3)
        q, k = norm_rope(q, k, norm, rope)
        q, k, v = (x.unflatten(2, (s.rows, s.columns)).contiguous() for x in (q, k, v))
        window = {"kernel_size": (frames, s.rows, s.columns), "is_causal": (mask.future == 0, False, False)}
        return na3d(q, k, v, scale=s.D**-0.5, **window).flatten(2, 3)

    return {"whole frames as the window": lambda: attention}
