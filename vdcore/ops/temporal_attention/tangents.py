"""Tangents of temporal attention, and what those of all attention are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import Run
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.call import AttentionCall, lse_dtype
from vdcore.ops.qk_norm_rope.tangents import Dual, norm_rope
from vdcore.ops.temporal_attention.reference import heads_first, visible_runs
from vdcore.rope import Rope

# Scores of a tile: these, their tangent and the probabilities stay in a core's caches together.
TILE = 1 << 17


def temporal_attention(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``: frames that see the same runs at once."""
    q, k, v = attention_duals(call, given)
    B, T, S, H, D = call.q.shape
    bias = (
        None if call.bias is None else each((call.bias, given.get("bias")), lambda x: x.to(v[0].dtype).expand(H, T, -1))
    )
    runs = visible_runs(call.mask, T, call.k.shape[1], call.q_start, call.lengths, B)
    out, lse = [], []
    for b in range(B):
        frames: list[tuple[Tensor, Tensor]] = [(q[0].new_zeros(S, H, D), q[0].new_zeros(S, H))] * T
        for seen, queries in alike(runs[b]):
            mine = each(q, partial(_queries, sample=b, frames=queries))
            keys, values = (each(x, partial(_keys, sample=b, runs=seen, heads=H)) for x in (k, v))
            added = None if bias is None else each(bias, partial(_pairs, runs=seen, frames=queries))
            do, ds = attend(mine, keys, values, call.scale, added)
            for i, t in enumerate(queries):
                frames[t] = do[:, :, i], ds[:, :, i]
        out += [do for do, _ in frames]
        lse += [ds for _, ds in frames]
    if not out:
        return call.q.new_zeros(call.q.shape), call.q.new_zeros(call.q.shape[:-1], dtype=lse_dtype(call.q))
    return torch.stack(out).reshape(call.q.shape).to(call.q.dtype), torch.stack(lse).reshape(call.q.shape[:-1])


def _queries(x: Tensor, sample: int, frames: list[int]) -> Tensor:
    """``(S, H, n, D)`` of ``(B, T, S, H, D)``."""
    return x[sample, frames].permute(1, 2, 0, 3)


def _keys(x: Tensor, sample: int, runs: list[Run], heads: int) -> Tensor:
    """``(S, H, n, D)`` of ``(B, T, S, G, D)``."""
    return heads_first(of_runs(x[sample], runs).transpose(0, 1), heads)


def _pairs(x: Tensor, runs: list[Run], frames: list[int]) -> Tensor:
    """``(H, n, m)`` of ``(H, T, T_k)``."""
    return torch.cat([x[:, frames, begin:end] for begin, end in runs], -1)


# ---- What engines take ----


def prepared(
    q: Dual, k: Dual, norm: QKNorm | None, rope: Rope | None, q_start: int, given: dict[str, Tensor], prefix: str = ""
) -> tuple[Dual, Dual]:
    """q and k as the scores see them: rounded to their dtype, as forward does, whose log-sum-exp is of these."""
    if norm is None and rope is None:
        return q, k
    sides = ((q, "q", q_start), (k, "k", 0))
    (q_, dq), (k_, dk) = (norm_rope(x, side, norm, rope, start, given, prefix) for x, side, start in sides)
    return (q_.to(q[0].dtype), dq), (k_.to(k[0].dtype), dk)


def qkv_duals(
    c: AttentionCall, given: dict[str, Tensor], prepare: Callable[..., tuple[Dual, Dual]] = prepared
) -> tuple[Dual, Dual, Dual]:
    """q, k and v as the scores see them; ``prepare``: norm and rope, with the arguments of :func:`prepared`."""
    if c.packed is not None:
        parts: Any = (None,) * 3 if "q" not in given else given["q"].unbind(3)
    else:
        parts = [given.get(x) for x in "qkv"]
    q, k = prepare((c.q, parts[0]), (c.k, parts[1]), c.norm, c.rope, c.q_start, given)
    return q, k, (c.v, parts[2])


# ---- What all attention tangents are made of ----


def each(dual: Dual, function: Callable[[Tensor], Tensor]) -> Dual:
    """A linear function of a tensor and of its tangent."""
    return function(dual[0]), None if dual[1] is None else function(dual[1])


def joined(duals: Sequence[Dual], dim: int) -> Dual:
    """Concatenated; a tangent that is None is 0 where another is not."""
    x = torch.cat([x for x, _ in duals], dim)
    if all(dx is None for _, dx in duals):
        return x, None
    return x, torch.cat([torch.zeros_like(x) if dx is None else dx for x, dx in duals], dim)


def attention_duals(call: Any, given: dict[str, Tensor]) -> tuple[Dual, Dual, Dual]:
    """q, k and v of an attention call as the scores see them, float32 at least."""
    dtype = compute_dtype(call.q.dtype)
    if call.packed is not None:
        parts: Any = (None,) * 3 if "q" not in given else given["q"].unbind(3)
    else:
        parts = [given.get(x) for x in "qkv"]
    q = norm_rope((call.q, parts[0]), "q", call.norm, call.rope, call.q_start, given)
    k = norm_rope((call.k, parts[1]), "k", call.norm, call.rope, 0, given)
    return q, k, each((call.v, parts[2]), lambda x: x.to(dtype))


def alike(runs: list[list[Run]]) -> Iterator[tuple[list[Run], list[int]]]:
    """Query frames by the runs that they see; those that see nothing left out."""
    found: dict[tuple[Run, ...], list[int]] = {}
    for t, seen in enumerate(runs):
        if seen:
            found.setdefault(tuple(seen), []).append(t)
    yield from ((list(seen), frames) for seen, frames in found.items())


def of_runs(x: Tensor, runs: list[Run]) -> Tensor:
    """The frames ``(n, ...)`` of a few runs."""
    parts = [x[begin:end] for begin, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(q: Dual, k: Dual, v: Dual, scale: float, bias: Dual | None = None) -> tuple[Tensor, Tensor]:
    """Tangents of ``out = softmax(scale q k^T + bias) v`` and of its log-sum-exp, a tile of scores at a time.

    With ``P`` the probabilities and ``E = scale (dq k^T + q dk^T) + dbias`` the scores' tangent:

    1. ``dlse = sum(P E)`` along a row,
    2. ``dout = (P (E - dlse)) v + P dv``.

    After Lu and Song (2025), appendix F. q ``(..., n, D)``, k and v ``(..., m, D)``, bias ``(H, n, m)`` with H the last
    of the leading dimensions; returns ``(..., n, D)`` and ``(..., n)``, 0 where there are no keys.
    """
    lead, (n, D), m = q[0].shape[:-2], q[0].shape[-2:], k[0].shape[-2]
    if m == 0 or q[0].numel() == 0:
        return q[0].new_zeros(q[0].shape), q[0].new_zeros(q[0].shape[:-1])
    q, k, v = (each(x, lambda y: y.reshape(-1, *y.shape[-2:])) for x in (q, k, v))
    rows = max(TILE // m, 1)
    many = max(rows // n, 1)
    tiles = [(slice(i, i + many), slice(j, j + rows)) for i in range(0, q[0].shape[0], many) for j in range(0, n, rows)]

    def tile(some: slice, queries: slice) -> tuple[Tensor, Tensor]:
        keys, values = (each(x, partial(_at, where=(some,))) for x in (k, v))
        added = None
        if bias is not None:
            heads = torch.arange(some.start, min(some.stop, q[0].shape[0]), device=q[0].device) % lead[-1]
            added = each(bias, lambda x: x[heads, queries])
        return _tile(each(q, partial(_at, where=(some, queries))), keys, values, scale, added)

    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:  # nothing may be written
        found = [tile(*where) for where in tiles]
        out, lse = torch.cat([do.reshape(-1, D) for do, _ in found]), torch.cat([ds.reshape(-1) for _, ds in found])
    else:  # results of tiles that outlive them would lie between their scores, and keep all this memory
        out, lse = torch.empty_like(q[0]), q[0].new_empty(q[0].shape[:-1])
        for where in tiles:
            out[where], lse[where] = tile(*where)
    return out.reshape(*lead, n, D), lse.reshape(*lead, n)


def _at(x: Tensor, where: tuple[slice, ...]) -> Tensor:
    return x[where]


def _tile(q: Dual, k: Dual, v: Dual, scale: float, bias: Dual | None) -> tuple[Tensor, Tensor]:
    (q_, dq), (k_, dk), (v_, dv) = q, k, v
    q_ = q_ * scale
    p = (q_ @ k_.mT if bias is None else torch.baddbmm(bias[0], q_, k_.mT)).softmax(-1)
    moved = None if dq is None else dq * scale @ k_.mT
    if dk is not None:
        moved = q_ @ dk.mT if moved is None else torch.baddbmm(moved, q_, dk.mT)
    if bias is not None and bias[1] is not None:
        moved = bias[1] if moved is None else moved + bias[1]
    if moved is None:
        lse = p.new_zeros(p.shape[:-1])
        return (p.new_zeros(q_.shape) if dv is None else p @ dv), lse
    moved = moved * p
    lse = moved.sum(-1)
    out = torch.addcmul(moved, p, lse[..., None], value=-1) @ v_
    return (out if dv is None else torch.baddbmm(out, p, dv)), lse
