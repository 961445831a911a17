"""What both kernels of backward read of the queries of boxes beside q."""

from __future__ import annotations

import triton
import triton.language as tl

from vdcore_kernels.core.tile import load_rows


@triton.jit
def load_box_pairs(p_pairs, i_b, i_h, first, o, N, H, m):
    """lse and delta of rows o [BM] of the result from ``first`` on; 0 where m is false."""
    p_row = p_pairs + ((i_b * H + i_h) * N + first + o) * 2
    return tl.split(tl.load(p_row[:, None] + tl.arange(0, 2)[None, :], mask=m[:, None], other=0.0))


@triton.jit
def load_box_do(do, i_b, i_h, first, o, m, TILE: tl.constexpr):
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    return load_rows(do.p + (i_b * do.b + i_h * do.h + first * do.s) * A, o * do.s * A, m, ROW)
