"""Cross attention on the CPU engine: frame attention whose keys are prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.frame_attention.cpu import Groups, Segment, attend, attend_backward, dead_runs, keep, numbers
from vdcore.ops.native import native, why_not
from vdcore.ops.qk_norm_rope.cpu import NormRopeBefore

if TYPE_CHECKING:
    from vdcore.ops.cross_attention import CrossCall


def _cut_per_frame(c: CrossCall) -> bool:
    """The frames of a sample share a prompt, each up to a length of its own: it lies there once for all frames."""
    return c.k.ndim == 4 and c.lengths is not None and c.lengths.ndim == 2


def problem(c: CrossCall) -> tuple[Groups, Segment]:
    B, T, S = c.q.shape[:3]
    lengths, L, cut = c.lengths, c.k.shape[-3], _cut_per_frame(c)
    per_frame = c.k.ndim == 5 or cut
    if lengths is not None and per_frame:
        lengths = (lengths if lengths.ndim == 2 else lengths[:, None]).expand(B, T)
    groups = native().prompt_groups(
        batch=B, frames=T, tokens=S, prompt=L, per_frame=per_frame, lengths=numbers(lengths)
    )
    q, (k, v) = c.q, (x if x.ndim == 5 else x.unsqueeze(1) for x in (c.k, c.v))  # (B, 1 or T, L, G, D)
    if c.norm is not None:
        dead = dead_runs(groups, "keys")
        if cut and lengths is not None:
            dead = [(b, min(max(n, 0), L), L) for b, n in enumerate(lengths.amax(1).tolist())]
        q, k = keep(q, dead_runs(groups, "queries")), keep(k, dead)
    return groups, Segment(NormRopeBefore(q, k, c.norm, None), v, T if cut else 1)


def _forward(c: CrossCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    groups, segment = problem(c)
    attend(groups, [segment], (out,), (lse,), c.scale)
    return out, lse


def _backward(
    c: CrossCall, outputs: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    groups, segment = problem(c)
    (out, lse), (dout, dlse) = outputs, grads
    dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
    dlse = None if dlse is None else unit_stride(dlse)
    dq, dk, dv = empty_like(c.q), empty_like(segment.before.k), empty_like(segment.v)
    cut = _cut_per_frame(c)
    if cut:  # shares of the frames, which are added up in float32
        dk, dv = (torch.empty(*x.shape[:1], c.q.shape[1], *x.shape[2:], dtype=torch.float32) for x in (dk, dv))
    attend_backward(groups, [segment], [(out,), (lse,), (dout,), (dlse,)], [(dq, dk, dv)], c.scale)
    if cut:
        dk, dv = (x.sum(1, keepdim=True).to(c.k.dtype) for x in (dk, dv))
    found = segment.before.backward(dq, dk, wanted) | {"v": dv}
    return found | {name: found[name].reshape(c.k.shape) for name in ("k", "v")}


def _why_not(c: CrossCall) -> str | None:
    return why_not(c.q, c.q.shape[-1])


CROSS = Implementation(_forward, _backward, _why_not)
