"""What all attention oracles are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.mask import FrameMask, Run
from vdcore.norm import QKNorm, compute_dtype
from vdcore.rope import Rope


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` and its log-sum-exp: q ``(..., n, D)``, k and v ``(..., m, D)``.

    With no keys the output is 0 and the log-sum-exp -inf.
    """
    if k.shape[-2] == 0:
        return q.new_zeros(q.shape), q.new_full(q.shape[:-1], -torch.inf)
    scores = q @ k.mT * scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def norm_rope(q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, q_start: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(B, T, S, heads, D)`` as the scores see them, float32 at least."""
    q, k = q.to(compute_dtype(q.dtype)), k.to(compute_dtype(k.dtype))
    if norm is not None:
        q, k = norm.q(q), norm.k(k)
    if rope is not None:
        q, k = rope.rotate(q, q_start), rope.rotate(k)
    return q, k


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
