"""Rows of channels ``(B, T, S, C)``, a few tokens of one frame at a time: for operators that are bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.tile import Rows, load_rows


@triton.jit
def frame_block(i, T, S, rows):
    """Sample and frame of the i-th of all frames' blocks of ``rows`` rows, and its first row."""
    blocks = tl.cdiv(S, rows)
    i_bt = (i // blocks).to(tl.int64)
    return i_bt // T, i_bt % T, (i % blocks) * rows


@triton.jit
def rows_from(i_b, i_t, first, S, BR: tl.constexpr):
    """Sample, frame, BR tokens from ``first`` on, and which of them exist."""
    o_s = first + tl.arange(0, BR)
    return i_b, i_t, o_s.to(tl.int64), o_s < S


@triton.jit
def token_rows(x, at, ROW: tl.constexpr):
    """Rows [BR, W] of Rows x (B, T, S, C)."""
    i_b, i_t, o_s, m_s = at
    return load_rows(x.p + i_b * x.b + i_t * x.t, o_s * x.s, m_s, ROW)


@triton.jit
def contiguous_rows(at, T, S, ROW: tl.constexpr):
    """Their offsets [BR] in a contiguous (B, T, S, C)."""
    i_b, i_t, o_s, m_s = at
    return ((i_b * T + i_t) * S + o_s) * ROW.D


def row_arguments(x: Tensor) -> Rows:
    """x as rows of tokens, read through its strides."""
    return Rows(x, x.stride(0), x.stride(1), x.stride(2), 0)
