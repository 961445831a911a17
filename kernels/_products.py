"""Matrix products of tiles: several positions at a time, rows in one or two tiles, hidden pairs left out exactly."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """[P, M, K] x [P, K, N]. One position alone is a plain product, which a warpgroup's instructions can serve."""
    if a.shape[0] == 1:
        c = tl.dot(
            tl.reshape(a, (a.shape[1], a.shape[2])),
            tl.reshape(b, (b.shape[1], b.shape[2])),
            input_precision=PRECISION,
        )
        return tl.reshape(c, (1, a.shape[1], b.shape[2]))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def transposed(x):
    """[P, M, N] -> [P, N, M]."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """Rows [P, M, D] times rows [P, N, D]: [P, M, N]."""
    s = product(a[0], transposed(b[0]), PRECISION)
    if len(a) > 1:
        s += product(a[1], transposed(b[1]), PRECISION)
    return s


@triton.jit
def _is_finite(x):
    return tl.sum(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1)) == 0


@triton.jit
def _one_by_one(p, x, seen):
    """[P, M, K] x [P, K, N] where seen [1, M, K]: what is hidden takes no part, whatever x holds there."""
    total = tl.zeros([p.shape[0], p.shape[1], x.shape[2]], tl.float32)
    o = tl.arange(0, p.shape[2])
    for i in range(p.shape[2]):
        one = (o == i)[None, None, :]
        weight = tl.sum(tl.where(one, p, 0.0), 2, keep_dims=True)  # [P, M, 1]
        shown = tl.sum(tl.where(one & seen, 1, 0), 2, keep_dims=True) > 0
        row = tl.sum(tl.where((o == i)[None, :, None], x.to(tl.float32), 0.0), 1, keep_dims=True)  # [P, 1, N]
        total += tl.where(shown, weight * row, 0.0)
    return total


@triton.jit
def _weighted(p, x, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    if MASKED:
        if _is_finite(x):
            total = product(p, x, PRECISION)
        else:
            total = _one_by_one(p.to(tl.float32), x, seen)
        return total
    else:
        return product(p, x, PRECISION)


@triton.jit
def weighted(p, x, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """p [P, M, K], 0 where hidden, times rows x [P, K, D].

    Where a tile mixes rows that see different frames, a hidden NaN or infinity must not come in as 0 * NaN, and one
    that is seen must. Tiles that hold such values, which is rare, are summed pair by pair.
    """
    p = p.to(x[0].dtype)
    if len(x) > 1:
        return _weighted(p, x[0], seen, MASKED, PRECISION), _weighted(p, x[1], seen, MASKED, PRECISION)
    else:
        return (_weighted(p, x[0], seen, MASKED, PRECISION),)
