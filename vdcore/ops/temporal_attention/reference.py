"""Oracle of temporal attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.reference._attend import (
    attend,
    heads_first,
    keep,
    norm_rope,
    seeing_frames,
    seen_frames,
    visible_runs,
)
from vdcore.rope import Rope


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
) -> tuple[Tensor, Tensor]:
    """Every token attends to the same position in the frames that its frame sees.

    q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; returns out ``(B, T, S, H, D)`` in q's dtype and lse
    ``(B, T, S, H)`` in float32 at least.
    """
    B, T, S, H, D = q.shape
    T_k = k.shape[1]
    runs = visible_runs(mask, T, T_k, q_start, lengths, B)
    qr, kr = norm_rope(keep(q, seeing_frames(runs, T)), keep(k, seen_frames(runs, T_k)), norm, rope, q_start)
    vr = v.to(compute_dtype(v.dtype))
    out, lse = [], []
    for b in range(B):
        for t in range(T):
            frames = [f for begin, end in runs[b][t] for f in range(begin, end)]
            keys = heads_first(kr[b, frames].transpose(0, 1), H)  # (S, H, n, D)
            values = heads_first(vr[b, frames].transpose(0, 1), H)
            o, s = attend(qr[b, t][:, :, None], keys, values, scale)  # one query a position
            out.append(o[:, :, 0])
            lse.append(s[:, :, 0])
    if not out:
        return q.new_zeros(q.shape), qr.new_zeros(q.shape[:-1])
    return torch.stack(out).reshape(q.shape).to(q.dtype), torch.stack(lse).reshape(q.shape[:-1])
