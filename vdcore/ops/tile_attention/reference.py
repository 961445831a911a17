"""Oracle of attention to listed tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.norm import compute_dtype
from vdcore.ops.frame_attention.reference import rows, take
from vdcore.ops.tile_attention.boxes import tokens_of


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    indices: Tensor,
    counts: Tensor,
    tile: tuple[int, int, int],
    grid: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The tokens of a tile attend to those of its listed tiles.

    q ``(B, T, S, H, D)``, k and v ``(B, T, S, G, D)``, indices ``(B or 1, H or 1, n, K)``, counts ``(B or 1, H or 1,
    n)``; returns out ``(B, T, S, H, D)`` in q's dtype and lse ``(B, T, S, H)`` in float32 at least.
    """
    B, T, _, H, _ = q.shape
    tokens = tokens_of(T, grid, tile)
    dtype = compute_dtype(q.dtype)
    qr, kr, vr = (x.to(dtype).flatten(1, 2) for x in (q, k, v))
    shared = H // k.shape[3] if k.shape[3] else 1
    listed, many = indices.tolist(), counts.tolist()
    order = torch.cat(tokens).argsort() if tokens else torch.zeros(0, dtype=torch.int64)
    out, lse = [], []
    for b in range(B):
        for h in range(H):
            i, j = b if counts.shape[0] > 1 else 0, h if counts.shape[1] > 1 else 0
            mine, theirs = slice(h, h + 1), slice(h // shared, h // shared + 1)
            found = []
            for n, some in enumerate(tokens):
                seen = [tokens[m] for m in listed[i][j][n][: many[i][j][n]]]
                keys = torch.cat(seen).sort().values if seen else some[:0]
                pair = (take(kr[b], keys)[:, theirs], take(vr[b], keys)[:, theirs])
                found.append(rows(take(qr[b], some)[:, mine], [pair], scale))
            out.append(torch.cat([o for o, _ in found])[order] if found else qr[b][:, mine])
            lse.append(torch.cat([s for _, s in found])[order] if found else qr.new_zeros(0, 1))
    if not out:
        return q.new_zeros(q.shape), qr.new_zeros(q.shape[:-1])
    whole, sums = (torch.cat(x, 1).unflatten(1, (B, H)).transpose(0, 1) for x in (out, lse))
    return whole.reshape(q.shape).to(q.dtype), sums.reshape(q.shape[:-1])
