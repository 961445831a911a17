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
def power(s, less, exponent):
    """2 ** ((s - less) * exponent), one fused multiply and add a score."""
    return tl.exp2(s * exponent - less * exponent)


@triton.jit
def times_rows(a, b, PRECISION: tl.constexpr):
    """Rows [M, D] times rows [N, D]: [M, N]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=PRECISION)
    return s


@triton.jit
def rows_times(p, x, total, PRECISION: tl.constexpr):
    """total [M, D] plus p [M, N] times rows [N, D]."""
    if len(x) > 1:
        first = tl.dot(p, x[0], total[0], input_precision=PRECISION)
        return first, tl.dot(p, x[1], total[1], input_precision=PRECISION)
    else:
        return (tl.dot(p, x[0], total[0], input_precision=PRECISION),)


@triton.jit
def _hidden_apart(p, x, seen, PRECISION: tl.constexpr):
    """[P, M, K] x [P, K, N] where seen [P or 1, M, K]: what is hidden takes no part, whatever x holds there.

    A hidden NaN or infinity must not come in as 0 * NaN, and one that is seen must. So x goes through the product
    without such values, and where there are any, which is rare, they are added pair by pair.
    """
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    total = product(p, tl.where(finite, x, 0.0), PRECISION)
    if tl.sum(tl.where(finite, 0, 1)) > 0:
        o = tl.arange(0, p.shape[2])
        for i in range(p.shape[2]):
            one = (o == i)[None, None, :]
            weight = tl.sum(tl.where(one, p, 0.0).to(tl.float32), 2, keep_dims=True)  # [P, M, 1]
            shown = tl.sum(tl.where(one & seen, 1, 0), 2, keep_dims=True) > 0
            strange = (o == i)[None, :, None] & ~finite
            row = tl.sum(tl.where(strange, x, 0.0).to(tl.float32), 1, keep_dims=True)  # [P, 1, N]
            some = tl.sum(tl.where(strange, 1, 0), 1, keep_dims=True) > 0
            total += tl.where(shown & some, weight * row, 0.0)
    return total


@triton.jit
def _weighted(p, x, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    if MASKED:
        return _hidden_apart(p, x, seen, PRECISION)
    else:
        return product(p, x, PRECISION)


@triton.jit
def weighted(p, x, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """p [P, M, K], 0 where hidden, times rows x [P, K, D]; MASKED: some rows of p see what others do not."""
    p = p.to(x[0].dtype)
    if len(x) > 1:
        return _weighted(p, x[0], seen, MASKED, PRECISION), _weighted(p, x[1], seen, MASKED, PRECISION)
    else:
        return (_weighted(p, x[0], seen, MASKED, PRECISION),)
