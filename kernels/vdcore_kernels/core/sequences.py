"""Lines of frames: what temporal attention's kernels share.

A line is one position and key/value head of a sample with all its frames. A program holds several, as a batch of small
matrices in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vdcore_kernels.core.frames import seeing_run, valid_frames, visible_runs
from vdcore_kernels.core.tile import (
    affine,
    by_weight,
    center,
    load_angles,
    load_rows,
    rotate,
    scale,
    settle,
    standardize,
    standardize_backward,
    store_rows,
    to,
)


@triton.jit
def line_block(i, S, G, BP: tl.constexpr):
    """Of the i-th of all samples' blocks: sample, and positions and key/value heads of its lines, [BP]."""
    blocks = tl.cdiv(S * G, BP)
    o_n = (i % blocks) * BP + tl.arange(0, BP)
    return (i // blocks).to(tl.int64), (o_n // G).to(tl.int64), (o_n % G).to(tl.int64), o_n < S * G


@triton.jit
def frame_pairs(p_len, i_b, frames, o_t, o_f, MASKED: tl.constexpr):
    """Of query frames o_t [BQ] those that see something, of key frames o_f [BK] those that someone sees, and who sees
    whom [1, BQ, BK]."""
    T, T_k, q_start, past, future, chunk, sink = frames
    valid, last = valid_frames(p_len, i_b, T, T_k, q_start)
    m_t = (q_start + o_t < last) & (valid > 0)
    m_f = o_f < valid
    seen = m_t[:, None] & m_f[None, :]
    if MASKED:
        low, begin, end = visible_runs(q_start + o_t, valid, past, future, chunk, sink)
        m_t = m_t & ((low > 0) | (begin < end))
        seen = seen & (o_f[None, :] < end[:, None])
        seen = seen & ((o_f[None, :] >= begin[:, None]) | (o_f[None, :] < low[:, None]))
        first, past_last = seeing_run(o_f, q_start, last, past, future, chunk, sink)
        m_f = m_f & (first < past_last)
    return m_t, m_f, seen[None, :, :]


@triton.jit
def frame_rows(x, i_b, o_s, o_h, o_t, m_n, m_t, A: tl.constexpr, ROW: tl.constexpr):
    """Rows of lines (position o_s, head o_h) [BP] at frames o_t [BT]: tiles [BP, BT, W]; 0 where masked."""
    o = (o_s * x.s + o_h * x.h)[:, None] + (o_t.to(tl.int64) * x.t)[None, :]
    return load_rows(x.p + i_b * x.b * A, o * A, m_n[:, None] & m_t[None, :], ROW)


@triton.jit
def frame_angles(
    angles, o_s, o_h, o_t, m_n, m_t, SIGN, LINES: tl.constexpr, ROW: tl.constexpr, STYLE: tl.constexpr, R2: tl.constexpr
):
    """Cosines and SIGN times sines [BP, BT, W/2]; [BT, W/2] where lines share them (LINES = 0)."""
    if LINES:
        o_cos = (o_s * angles.cs + o_h * angles.ch)[:, None] + (o_t * angles.cf)[None, :]
        o_sin = (o_s * angles.ss + o_h * angles.sh)[:, None] + (o_t * angles.sf)[None, :]
        m = m_n[:, None] & m_t[None, :]
    else:
        o_cos = o_t.to(tl.int64) * angles.cf
        o_sin = o_t.to(tl.int64) * angles.sf
        m = m_t
    b_cos = load_angles(angles.cos, o_cos, m, 1.0, ROW, STYLE, R2)
    return b_cos, scale(load_angles(angles.sin, o_sin, m, 0.0, ROW, STYLE, R2), SIGN)


@triton.jit
def _normed(b_x, norm, p_stats, i_b, T, S, o_s, o_h, o_t, m, ROW: tl.constexpr, KIND: tl.constexpr, ALL: tl.constexpr):
    """float32 rows [BP, BT, W], normed: by statistics of whole tokens with ALL, else by their own."""
    if ALL:
        p_row = p_stats + ((i_b * T + o_t)[None, :] * S + o_s[:, None]) * 2
        b_x = center(b_x, tl.load(p_row, mask=m, other=0.0)[:, :, None], m, ROW)
        b_x = scale(b_x, tl.load(p_row + 1, mask=m, other=0.0)[:, :, None])
        return affine(b_x, norm, (o_h * ROW.D)[:, None], m, ROW, 1)
    else:
        b_x, _ = standardize(b_x, m, ROW.D, norm.eps, ROW, KIND, 0)
        return affine(b_x, norm, o_h, m, ROW, 0)


@triton.jit
def normed_turned(
    b_x,  # [BP, BT, W]
    norm,
    p_stats,  # (B, T, S, 2) with ALL
    angles,
    start,  # frame of the table that frame 0 turns by
    i_b,
    T,
    S,
    o_s,
    o_h,
    o_t,
    m_n,
    m_t,
    LINES: tl.constexpr,
    ROW: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    """Rows as the scores see them: normed, then rotated, in their dtype."""
    if KIND > 0 or STYLE > 0:
        b_y = to(b_x, tl.float32)
        if KIND > 0:
            b_y = _normed(b_y, norm, p_stats, i_b, T, S, o_s, o_h, o_t, m_n[:, None] & m_t[None, :], ROW, KIND, ALL)
        if STYLE > 0:
            b_cos, b_sin = frame_angles(angles, o_s, o_h, start + o_t, m_n, m_t, 1.0, LINES, ROW, STYLE, R2)
            b_y = rotate(b_y, b_cos, b_sin, STYLE)
        return settle(to(b_y, b_x[0].dtype))
    else:
        return b_x


@triton.jit
def gradient_back(
    b_g,  # float32 [BP, BT, W]: gradient of the rows as the scores see them
    x,  # Rows of the raw rows
    norm,
    angles,
    start,
    i_b,
    o_s,
    o_h,
    o_t,
    m_n,
    m_t,
    LINES: tl.constexpr,
    A: tl.constexpr,
    ROW: tl.constexpr,
    KIND: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    """Gradient of the raw rows; and, before the norm's weight and after, what its weight and bias sum up."""
    if STYLE > 0:
        b_cos, b_sin = frame_angles(angles, o_s, o_h, start + o_t, m_n, m_t, -1.0, LINES, ROW, STYLE, R2)
        b_g = rotate(b_g, b_cos, b_sin, STYLE)
    b_h = b_g
    b_b = b_g
    if KIND > 0:
        m = m_n[:, None] & m_t[None, :]
        b_x = frame_rows(x, i_b, o_s, o_h, o_t, m_n, m_t, A, ROW)
        b_h, rstd = standardize(to(b_x, tl.float32), m, ROW.D, norm.eps, ROW, KIND, 0)
        b_g = standardize_backward(by_weight(b_b, norm, o_h, m, ROW, 0), b_h, rstd, m, ROW.D, ROW, KIND, 0)
    return b_g, b_h, b_b


@triton.jit
def store_frames(x, i_b, o_s, o_h, o_t, m_n, T, b_x, A: tl.constexpr, ROW: tl.constexpr):
    """Stores rows of lines at all of T frames."""
    o = (o_s * x.s + o_h * x.h)[:, None] + (o_t.to(tl.int64) * x.t)[None, :]
    store_rows(x.p + i_b * x.b * A, o * A, m_n[:, None] & (o_t < T)[None, :], b_x, ROW)
