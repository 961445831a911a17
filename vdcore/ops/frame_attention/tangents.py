"""Tangents of spatial and video attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.ops.call import lse_dtype
from vdcore.ops.frame_attention.reference import Sets, take, token_groups
from vdcore.ops.qk_norm_rope.tangents import Dual, norm_rope
from vdcore.ops.temporal_attention.reference import counts, heads_first
from vdcore.ops.temporal_attention.tangents import attend, attention_duals, each, joined

Rows = tuple[Tensor, Tensor]  # tangents of out (n, H, D) and lse (n, H)


def video_attention(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of out ``(B, T*S + L, H, D)`` and lse ``(B, T*S + L, H)``: queries that see the same keys at once."""
    q, k, v = attention_duals(call, given)
    (B, T, S, H, D), T_k = call.q.shape, call.k.shape[1]
    text = None if call.text is None else _text_duals(call, given)
    L = 0 if call.text is None else call.text[0].shape[1]
    frames, text_valid = counts(call.lengths, B, max(T_k, call.q_start + T)), counts(call.text_lengths, B, L)
    out, lse = [], []
    for b in range(B):
        valid, alive = min(frames[b], T_k), min(max(frames[b] - call.q_start, 0), T)
        groups = token_groups(call.mask, T, T_k, S, call.q_start, H, valid, alive)
        tokens = [each(x, partial(_tokens, sample=b)) for x in (q, k, v)]
        words = None if text is None else [each(x, partial(_first, sample=b, count=text_valid[b])) for x in text]
        parts = [_video_rows(tokens, groups, words, alive * S, call.scale)]
        if words is not None:
            m = valid * S if call.text_sees == "all" else 0
            keys, values = (joined([each(tokens[i], partial(_until, count=m)), words[i]], 0) for i in (1, 2))
            parts += [rows(words[0], keys, values, call.scale), nothing(q[0], L - text_valid[b])]
            if call.text_first:
                parts = parts[1:] + parts[:1]
        out.append(torch.cat([do for do, _ in parts]))
        lse.append(torch.cat([ds for _, ds in parts]))
    if not out:
        N = T * S + L
        return call.q.new_zeros(B, N, H, D), call.q.new_zeros(B, N, H, dtype=lse_dtype(call.q))
    return torch.stack(out).to(call.q.dtype), torch.stack(lse)


def _video_rows(
    tokens: list[Dual], groups: list[tuple[int, int, Sets]], words: list[Dual] | None, alive: int, scale: float
) -> Rows:
    """q, k, v ``(n, heads, D)`` of one sample, of which the first ``alive`` query tokens see the text too."""
    q, k, v = tokens
    shared = q[0].shape[1] // k[0].shape[1] if k[0].shape[1] else 1
    parts = []
    for first, end, sets in groups:
        theirs = slice(first // shared, end // shared)
        found = []
        for some, seen in sets:
            mine = each(q, partial(_at, tokens=some, heads=slice(first, end)))
            keys, values = (each(x, partial(_at, tokens=seen, heads=theirs)) for x in (k, v))
            if words is not None and some[0] < alive:
                said = [each(x, partial(_of, heads=theirs)) for x in words[1:]]
                keys, values = joined([keys, said[0]], 0), joined([values, said[1]], 0)
            found.append(rows(mine, keys, values, scale))
        order = torch.cat([some for some, _ in sets]).argsort()
        parts.append([torch.cat(x)[order] for x in zip(*found)])
    if not parts:
        return nothing(q[0], 0)
    return torch.cat([do for do, _ in parts], 1), torch.cat([ds for _, ds in parts], 1)


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


def _tokens(x: Tensor, sample: int) -> Tensor:
    """``(n, heads, D)`` of ``(B, T, S, heads, D)``."""
    return x[sample].flatten(0, 1)


def _until(x: Tensor, count: int) -> Tensor:
    return x[:count]


def _at(x: Tensor, tokens: Tensor, heads: slice) -> Tensor:
    return take(x, tokens)[:, heads]


def _of(x: Tensor, heads: slice) -> Tensor:
    return x[:, heads]
