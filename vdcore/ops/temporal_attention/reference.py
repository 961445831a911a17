"""Oracle of temporal attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.mask import FrameMask, Run
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.qk_norm_rope.reference import norm_rope
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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every token attends to the same position in the frames that its frame sees.

    q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``, bias ``(H or 1, T, T_k)``; returns out ``(B, T, S, H, D)`` in
    q's dtype and lse ``(B, T, S, H)`` in float32 at least.
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
            added = None if bias is None else bias[:, t][:, None, frames].to(vr.dtype)  # (H or 1, 1, n)
            o, s = attend(qr[b, t][:, :, None], keys, values, scale, added)  # one query per position
            out.append(o[:, :, 0])
            lse.append(s[:, :, 0])
    if not out:
        return q.new_zeros(q.shape), qr.new_zeros(q.shape[:-1])
    return torch.stack(out).reshape(q.shape).to(q.dtype), torch.stack(lse).reshape(q.shape[:-1])


# ---- What all attention references are made of ----


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` and its log-sum-exp: q ``(..., n, D)``, k and v ``(..., m, D)``.

    With no keys the output is 0 and the log-sum-exp -inf.
    """
    if k.shape[-2] == 0:
        return q.new_zeros(q.shape), q.new_full(q.shape[:-1], -torch.inf)
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def counts(lengths: Tensor | None, batch: int, most: int) -> list[int]:
    """Of each sample: its length, where below 0 counts as 0 and above ``most`` as ``most``; None: ``most``."""
    return [most] * batch if lengths is None else [min(max(n, 0), most) for n in lengths.tolist()]


def visible_runs(
    mask: FrameMask, T_q: int, T_k: int, q_start: int, lengths: Tensor | None, batch: int
) -> list[list[list[Run]]]:
    """``[sample][query frame] -> runs`` of visible key frames, cut off at the sample's length."""
    out = []
    for length in counts(lengths, batch, max(T_k, q_start + T_q)):
        rows = []
        for t, runs in enumerate(mask.runs(T_q, T_k, q_start)):
            cut = [(begin, min(end, length)) for begin, end in runs]
            rows.append([run for run in cut if run[0] < run[1]] if q_start + t < length else [])
        out.append(rows)
    return out


def seen_frames(runs: list[list[list[Run]]], T_k: int) -> Tensor:
    """``(B, T_k)``: key frames that at least one query frame sees."""
    live = torch.zeros(len(runs), T_k, dtype=torch.bool)
    for b, rows in enumerate(runs):
        for begin, end in (run for row in rows for run in row):
            live[b, begin:end] = True
    return live


def seeing_frames(runs: list[list[list[Run]]], T_q: int) -> Tensor:
    """``(B, T_q)``: query frames that see at least one key frame."""
    return torch.tensor([[bool(row) for row in rows] for rows in runs], dtype=torch.bool).reshape(len(runs), T_q)


def keep(x: Tensor, live: Tensor) -> Tensor:
    """x with 0 where ``live``, over its leading dimensions, is false: what lies there reaches no gradient.

    A weight that all rows share would otherwise collect ``0 * NaN`` from rows that take no part.
    """
    live = live.to(x.device).reshape(live.shape + (1,) * (x.ndim - live.ndim))
    return torch.where(live, x, torch.zeros_like(x))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """``(..., n, G, D) -> (..., heads, n, D)``: every key/value head repeated for the query heads that share it."""
    x = x.transpose(-3, -2)
    return x.repeat_interleave(heads // x.shape[-3], dim=-3) if x.shape[-3] != heads else x
