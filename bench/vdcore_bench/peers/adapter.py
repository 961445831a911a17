"""What all attention peers share: the public arguments as the rows that a library takes, and masks it understands.

A library's attention is a function ``attend(q, k, v, scale)`` on q ``(N, n, H, D)``, k and v ``(N, m, G, D)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore import FrameMask
from vdcore_bench.jobs.base import Job

Function = Callable[..., Any]
Makers = dict[str, Callable[[], Function]]  # variants by name; made only where they run, for masks take memory
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def to_rows(op: str, x: Tensor) -> Tensor:
    """``(B, T, S, heads, D)`` as ``(N, n, heads, D)`` of independent problems; a view where the strides allow it."""
    if op == "temporal_attention":
        return x.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, 1) if op == "spatial_attention" else x.flatten(1, 2)


def from_rows(op: str, y: Tensor, like: Tensor) -> Tensor:
    B, T, S = like.shape[:3]
    if op == "temporal_attention":
        return y.unflatten(0, (B, S)).transpose(1, 2).contiguous()
    return y.reshape(*like.shape).contiguous()


def norm_rope(q: Tensor, k: Tensor, norm: Any, rope: Any) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if norm is not None:
        q, k = norm.q(q), norm.k(k)
    if rope is not None:
        q, k = rope.rotate(q), rope.rotate(k)
    return q.to(dtype), k.to(dtype)


def narrow(job: Job) -> bool:
    """In half precision on a CPU, where computing in float32 is often faster, casts included."""
    return job.device == "cpu" and job.dtype != torch.float32


def in_float32(attend: Attend) -> Attend:
    def widened(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attend(q.float(), k.float(), v.float(), scale).to(q.dtype)

    return widened


def compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def whole_job(op: str, attend: Attend, norm_rope: Function = norm_rope) -> Function:
    """Everything around a library's attention: norm, rope, layout, text, and a contiguous result."""

    def attention(q: Tensor, k: Any = None, v: Any = None, *, norm: Any = None, rope: Any = None, **rest: Any) -> Any:
        q, k, v = (q, k, v) if k is not None else q.unbind(3)
        scale = q.shape[-1] ** -0.5
        like = q
        q, k = norm_rope(q, k, norm, rope)
        if op == "cross_attention":
            return attend(q.flatten(1, 2), k, v, scale).reshape(like.shape).contiguous()
        rows = tuple(to_rows(op, x) for x in (q, k, v))
        if "text" not in rest:
            return from_rows(op, attend(rows[0], rows[1], rows[2], scale), like)
        tq, tk, tv = rest["text"]
        tq, tk = norm_rope(tq, tk, rest.get("text_norm"), None)
        joint_q, joint_k, joint_v = (torch.cat(pair, 1) for pair in zip(rows, (tq, tk, tv)))
        out = attend(joint_q, joint_k, joint_v, scale).contiguous()
        n = rows[0].shape[1]
        return out[:, :n].unflatten(1, like.shape[1:3]), out[:, n:]

    def gated(spatial: Any, temporal: Any, gate: Tensor, *, norm: Any, rope: Any) -> Tensor:
        a = whole_job("spatial_attention", attend, norm_rope)(*spatial, norm=norm[0], rope=rope[0])
        b = whole_job("temporal_attention", attend, norm_rope)(*temporal, norm=norm[1], rope=rope[1])
        return gate * a + (1 - gate) * b

    return gated if op == "gated_attention" else attention


def sample_by_sample(op: str, attend: Attend) -> Function:
    """One call per sample: the rows of a sample are a view where those of the batch would be a copy."""
    one = whole_job(op, attend)

    def attention(q: Tensor, k: Any = None, v: Any = None, **rest: Any) -> Tensor:
        parts = zip(*(x.split(1) for x in (q, k, v) if x is not None))
        return torch.cat([one(*part, **rest) for part in parts])

    return attention


# ---- Masks ----


def masked(job: Job) -> bool:
    return job.mask != FrameMask.full() or job.grid_mask is not None


def unit(job: Job) -> int:
    """Tokens of a frame in a row of the job's problems."""
    return 1 if job.op == "temporal_attention" else job.shape.S


def text_tokens(job: Job) -> int:
    """Text tokens that join the video's sequence."""
    return job.shape.L if getattr(job, "text", False) else 0


def dense_mask(job: Job) -> Tensor | None:
    """``(n, m)``, true where visible: of all tokens, the text's last; None if everything is."""
    if not masked(job):
        return None
    if job.grid_mask is not None:
        seen = job.grid_mask.visible(job.shape.T, job.shape.rows, job.shape.columns).to(job.device)
    else:
        seen = job.mask.visible(job.shape.T).to(job.device)
        seen = seen.repeat_interleave(unit(job), 0).repeat_interleave(unit(job), 1)
    text = text_tokens(job)
    return F.pad(seen, (0, text, 0, text), value=True) if text else seen


def run_by_run(attend: Attend, job: Job) -> Attend:
    """The mask as slices: one dense call for all frames that see the same frames. No mask, no hidden pair."""
    tokens = unit(job)
    groups = []
    for runs, frames in groupby(enumerate(job.mask.runs(job.shape.T)), key=lambda pair: pair[1]):
        numbers = [number for number, _ in frames]
        groups.append((numbers[0] * tokens, (numbers[-1] + 1) * tokens, [(a * tokens, b * tokens) for a, b in runs]))

    def sliced(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts = []
        for first, last, runs in groups:
            keys, values = (
                x[:, runs[0][0] : runs[0][1]] if len(runs) == 1 else torch.cat([x[:, a:b] for a, b in runs], 1)
                for x in (k, v)
            )
            parts.append(attend(q[:, first:last], keys, values, scale))
        return torch.cat(parts, 1)

    return sliced


def dense_only(job: Job, attend: Attend) -> Makers:
    """The variants of a library without masks of ours."""
    if masked(job):
        return {"one call a run": lambda: whole_job(job.op, run_by_run(attend, job))}
    return {"strided": lambda: whole_job(job.op, attend)}


def window_tables(job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """A grid mask as three small tables: of frames ``(T, T)``, and by pairs of frames of rows and of columns.

    A pair is visible where all three are, ``(T, T)``, ``(T, R, T, R)`` and ``(T, C, T, C)``.
    """
    mask, s = job.grid_mask, job.shape
    assert mask is not None
    # Frames that are seen in full are so in the other two.
    whole = replace(mask, frames=FrameMask.full(), frame_border="clip")
    frames = replace(mask, rows=None, columns=None).visible(s.T, 1, 1)
    rows = replace(whole, columns=None).visible(s.T, s.rows, 1).view(s.T, s.rows, s.T, s.rows)
    columns = replace(whole, rows=None).visible(s.T, 1, s.columns).view(s.T, s.columns, s.T, s.columns)
    return frames.to(job.device), rows.to(job.device), columns.to(job.device)


def scores(job: Job) -> int:
    """Elements of the scores of all pairs, hidden ones too."""
    s = job.shape
    if job.op == "cross_attention":
        return s.B * s.H * s.T * s.S * s.L
    text = text_tokens(job)
    spatial, temporal = s.B * s.H * s.T * s.S**2, s.B * s.H * s.S * s.T**2
    return {
        "spatial_attention": spatial,
        "temporal_attention": temporal,
        "gated_attention": max(spatial, temporal),
    }.get(job.op, s.B * s.H * (s.T * s.S + text) ** 2)


def materialized(job: Job) -> int:
    """Scores and probabilities of all pairs live at once; backward holds the probabilities and two gradients."""
    mask = scores(job) // (job.shape.B * job.shape.H) if masked(job) else 0
    return (3 if job.has_backward else 2) * scores(job) * job.dtype.itemsize + mask
