"""torch's FlexAttention, with block masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import (
    Function,
    Makers,
    compiled,
    masked,
    norm_rope,
    text_tokens,
    unit,
    whole_job,
    window_tables,
)
from vdcore_bench.peers.registry import ATTENTION, peer


def _why_not(job: Job) -> str | None:
    if torch.device(job.device).type == "cpu" and job.has_backward:
        return "FlexAttention has no backward on the CPU"
    return None


@peer("flex", ATTENTION, why_not=_why_not, slow_start=True)
def flex(job: Job) -> Makers:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A sweep compiles one function for every mask, dtype and size; after eight torch would give up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)

    def block_mask(padding: int) -> Any:
        if not masked(job):
            return None
        if job.grid_mask is not None:
            return windows()
        mask, tokens, video = job.mask, unit(job), job.shape.T * unit(job)
        text = text_tokens(job)
        seen = mask.visible(job.shape.T).to(job.device)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            frames = (x.clamp(max=video - 1) // tokens for x in (i, j))
            shown = (i >= video) | (j >= video) | seen[tuple(frames)]
            return shown & (i < n) & (j < n) | (i == j) if padding else shown

        n = video + text
        return create_block_mask(visible, None, None, n + padding, n + padding, device=job.device)

    def windows() -> Any:
        """By small tables of frames, rows and columns: looking one entry up in each is all that a pair costs."""
        frames, rows, columns = window_tables(job)
        S, C, n = job.shape.S, job.shape.columns, job.shape.T * job.shape.S

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            f, g = i // S, j // S
            near = rows[f, i % S // C, g, j % S // C] & columns[f, i % C, g, j % C]
            return frames[f, g] & near

        return create_block_mask(visible, None, None, n, n, device=job.device)

    def make(pads: bool = False) -> Function:
        """``pads``: to a multiple of 128 tokens, as Self-Forcing and CausVid call it."""
        tokens = job.shape.T * unit(job) + text_tokens(job)
        padding = -tokens % 128 if pads else 0
        call, blocks = compiled(flex_attention), block_mask(padding)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            gqa, n = q.shape[2] != k.shape[2], q.shape[1]
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in (q, k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return call(q, k, v, block_mask=blocks, scale=scale, enable_gqa=gqa).transpose(1, 2)[:, :n]

        # Compiled apart: in one graph with norm and rope, Inductor fails to lower FlexAttention on the CPU.
        return whole_job(job.op, attend, compiled(norm_rope) if job.norm_rope else norm_rope)

    if masked(job) and job.op == "video_attention" and job.grid_mask is None:
        return {"compiled": make, "padded": partial(make, True)}
    return {"compiled": make}
