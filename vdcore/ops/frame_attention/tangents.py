"""Tangents of spatial and video attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import Run
from vdcore.ops.call import lse_dtype
from vdcore.ops.qk_norm_rope.tangents import Dual, norm_rope
from vdcore.ops.temporal_attention.reference import counts, heads_first, visible_runs
from vdcore.ops.temporal_attention.tangents import alike, attend, attention_duals, each, joined, of_runs

Rows = tuple[Tensor, Tensor]  # tangents of out (n, H, D) and lse (n, H)


def video_attention(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of out ``(B, T*S + L, H, D)`` and lse ``(B, T*S + L, H)``: frames that see the same runs at once."""
    q, k, v = attention_duals(call, given)
    (B, T, S, H, D), T_k = call.q.shape, call.k.shape[1]
    text = None if call.text is None else _text_duals(call, given)
    L = 0 if call.text is None else call.text[0].shape[1]
    runs = visible_runs(call.mask, T, T_k, call.q_start, call.lengths, B)
    frames, text_valid = counts(call.lengths, B, max(T_k, call.q_start + T)), counts(call.text_lengths, B, L)
    out, lse = [], []
    for b in range(B):
        words = None if text is None else tuple(each(x, partial(_first, sample=b, count=text_valid[b])) for x in text)
        video = [nothing(q[0], S)] * T
        alive = [t for t in range(T) if call.q_start + t < frames[b]]
        groups = list(alike(runs[b]))
        if words is not None:  # frames that see no frame may see the text
            blind = [t for t in alive if not runs[b][t]]
            groups += [([], blind)] if blind else []
        for seen, queries in groups:
            mine = each(q, partial(_queries, sample=b, frames=queries))
            keys, values = (_pieces(x, b, seen, None if words is None else words[i]) for i, x in ((1, k), (2, v)))
            do, ds = rows(mine, keys, values, call.scale)
            for i, t in enumerate(queries):
                video[t] = do[i * S : (i + 1) * S], ds[i * S : (i + 1) * S]
        parts = video
        if words is not None:
            seen = [(0, min(frames[b], T_k))] if call.text_sees == "all" else []
            keys, values = (_pieces(x, b, seen, words[i]) for i, x in ((1, k), (2, v)))
            said = [rows(words[0], keys, values, call.scale), nothing(q[0], L - text_valid[b])]
            parts = said + video if call.text_first else video + said
        out.append(torch.cat([do for do, _ in parts]) if parts else q[0].new_zeros(0, H, D))
        lse.append(torch.cat([ds for _, ds in parts]) if parts else q[0].new_zeros(0, H))
    if not out:
        N = T * S + L
        return call.q.new_zeros(B, N, H, D), call.q.new_zeros(B, N, H, dtype=lse_dtype(call.q))
    return torch.stack(out).to(call.q.dtype), torch.stack(lse)


def rows(q: Dual, k: Dual, v: Dual, scale: float) -> Rows:
    """Queries ``(n, H, D)`` against keys and values ``(m, G, D)``."""
    heads = q[0].shape[1]
    mine = each(q, lambda x: x.transpose(0, 1))
    keys, values = (each(x, partial(heads_first, heads=heads)) for x in (k, v))
    out, lse = attend(mine, keys, values, scale)
    return out.transpose(0, 1), lse.transpose(0, 1)


def nothing(like: Tensor, count: int) -> Rows:
    """Rows that see nothing; ``like``: ``(..., H, D)``."""
    H, D = like.shape[-2:]
    return like.new_zeros(count, H, D), like.new_zeros(count, H)


def _text_duals(call: Any, given: dict[str, Tensor]) -> tuple[Dual, Dual, Dual]:
    """q, k and v of the text, ``(B, L, heads, D)``: normed, never rotated."""
    q, k, v = ((x, given.get(f"text_{name}")) for name, x in zip("qkv", call.text))
    q, k = (norm_rope(x, side, call.text_norm, None, 0, given, "text_") for side, x in (("q", q), ("k", k)))
    return q, k, each(v, lambda x: x.to(q[0].dtype))


def _first(x: Tensor, sample: int, count: int) -> Tensor:
    return x[sample, :count]


def _queries(x: Tensor, sample: int, frames: list[int]) -> Tensor:
    """``(n S, H, D)`` of ``(B, T, S, H, D)``."""
    return x[sample, frames].flatten(0, 1)


def _tokens(x: Tensor, sample: int, runs: list[Run]) -> Tensor:
    """``(n S, G, D)`` of ``(B, T_k, S, G, D)``."""
    return of_runs(x[sample], runs).flatten(0, 1)


def _pieces(x: Dual, sample: int, runs: list[Run], text: Dual | None) -> Dual:
    """Tokens of the frames and of the text."""
    parts = [each(x, partial(_tokens, sample=sample, runs=runs))] if runs else []
    return joined(parts + ([] if text is None else [text]), 0)
