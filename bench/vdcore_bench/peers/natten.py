"""NATTEN: its own windows of positions, and windows of whole frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore import GridMask
from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, masked, norm_rope, text_tokens
from vdcore_bench.peers.registry import library, peer


def _why_not(job: Job) -> str | None:
    reason = library("natten", needs_half=False)(job)
    if reason is not None:
        return reason
    mask = job.mask
    if job.grid_mask is not None:
        if _kernel(job) is None:
            return "its windows are those of GridMask.neighborhood, no larger than the video"
    elif masked(job) and (mask.future != 0 or mask.chunk > 1 or mask.sink or (mask.past or 0) >= job.shape.T):
        return "its windows are causal windows of frames, without chunks and sinks"
    if text_tokens(job) or job.shape.G != job.shape.H:
        return "it has neither text nor grouped heads"
    return None


def _kernel(job: Job) -> tuple[int, int, int] | None:
    """The window that a grid mask is in NATTEN's terms."""
    mask, s = job.grid_mask, job.shape
    if mask is None or mask.frames.past is None or not isinstance(mask.rows, int) or not isinstance(mask.columns, int):
        return None
    size = 2 * mask.frames.past + 1, 2 * mask.rows + 1, 2 * mask.columns + 1
    fits = all(n <= most for n, most in zip(size, (s.T, s.rows, s.columns)))
    return size if fits and mask == GridMask.neighborhood(size) else None


@peer("natten", ("video_attention",), why_not=_why_not, module="natten")
def natten(job: Job) -> Makers:
    from natten import na3d

    s, mask, kernel = job.shape, job.mask, _kernel(job)
    frames = s.T if mask.past is None else mask.past + 1

    def attention(
        q: Tensor, k: Any = None, v: Any = None, *, norm: Any, rope: Any, mask: Any, grid: Any = None
    ) -> Tensor:
        q, k, v = (q, k, v) if k is not None else q.unbind(3)
        q, k = norm_rope(q, k, norm, rope)
        q, k, v = (x.unflatten(2, (s.rows, s.columns)).contiguous() for x in (q, k, v))
        window: dict[str, Any] = {"kernel_size": (frames, s.rows, s.columns)}
        window = (
            {**window, "is_causal": (mask.future == 0, False, False)} if kernel is None else {"kernel_size": kernel}
        )
        return na3d(q, k, v, scale=s.D**-0.5, **window).flatten(2, 3)

    return {"whole frames as the window" if kernel is None else "its window": lambda: attention}
