"""Tangents of cross attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdcore.norm import compute_dtype
from vdcore.ops.call import lse_dtype
from vdcore.ops.frame_attention.tangents import rows
from vdcore.ops.qk_norm_rope.tangents import norm_rope
from vdcore.ops.temporal_attention.tangents import each


def cross_attention(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``: frames of one text at once."""
    (B, T, S, H, D), L, per_frame = call.q.shape, call.k.shape[-3], call.k.ndim == 5
    dtype = compute_dtype(call.q.dtype)
    q = norm_rope((call.q, given.get("q")), "q", call.norm, None, 0, given)
    k = norm_rope((call.k, given.get("k")), "k", call.norm, None, 0, given)
    v = each((call.v, given.get("v")), lambda x: x.to(dtype))
    valid = torch.full((B, 1), L) if call.lengths is None else call.lengths.cpu().clamp(0, L)
    counts = (valid if valid.ndim == 2 else valid[:, None]).expand(B, T).tolist()
    apart = per_frame or (call.lengths is not None and call.lengths.ndim == 2)
    out, lse = [], []
    for b in range(B):
        for t in range(T if apart else min(T, 1)):
            frames = slice(t, t + 1) if apart else slice(0, T)
            mine = each(q, partial(_queries, sample=b, frames=frames))
            keys, values = (each(x, partial(_text, sample=b, frame=t, count=counts[b][t])) for x in (k, v))
            do, ds = rows(mine, keys, values, call.scale)
            out.append(do.reshape(-1, S, H, D))
            lse.append(ds.reshape(-1, S, H))
    if not out:
        return call.q.new_zeros(call.q.shape), call.q.new_zeros(call.q.shape[:-1], dtype=lse_dtype(call.q))
    return torch.cat(out).reshape(call.q.shape).to(call.q.dtype), torch.cat(lse).reshape(call.q.shape[:-1])


def _queries(x: Tensor, sample: int, frames: slice) -> Tensor:
    """``(n S, H, D)`` of ``(B, T, S, H, D)``."""
    return x[sample, frames].flatten(0, 1)


def _text(x: Tensor, sample: int, frame: int, count: int) -> Tensor:
    """``(n, G, D)`` of ``(B, L, G, D)`` or ``(B, T, L, G, D)``."""
    return (x[sample] if x.ndim == 4 else x[sample, frame])[:count]
