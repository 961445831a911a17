"""Temporal attention, forward, with up to 128 frames a side: positions and heads side by side, each row read once.

Bound by memory: T/2 FLOP a byte. A program holds BP lines (position, key/value head) of a sample with all their frames, as
a batch of small matrices: q, k and v are read through their strides, normed and rotated in registers, and the result is
written. Nothing is permuted, and lines share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from vdcore.kernels._frames import mask_numbers, seeing_run, valid_frames, visible_runs
from vdcore.kernels._launch import Config, arch_of, cdiv, launch, pick, power_of_2, step
from vdcore.kernels._products import inner, weighted
from vdcore.kernels._tile import (
    Row,
    affine,
    center,
    keep,
    load_angles,
    load_rows,
    norm_arguments,
    rope_arguments,
    rotate,
    rows,
    scale,
    settle,
    split_row,
    standardize,
    store_rows,
    to,
)
from vdcore.kernels.qk_norm_rope import row_stats

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope

MAX_FRAMES = 128
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class TemporalConfig(Config):
    """values: of q, of k and of v each, that a program holds at a time: lines x frames x channels."""

    values: int = 10240


FORWARD = (
    TemporalConfig("interpreter", 4, 1, "several lines and several programs in a small case", 1024),
    TemporalConfig("", 4, 1, "predicted", 10240),
    TemporalConfig("", 8, 1, "predicted", 20480),
    TemporalConfig("", 8, 1, "predicted", 32768),
)


# ---- What forward and backward share ----


@triton.jit
def line_block(i, S, G, BP: tl.constexpr):
    """Of the i-th of all samples' blocks: sample, and positions and key/value heads of its lines, [BP]."""
    blocks = tl.cdiv(S * G, BP)
    o_n = (i % blocks) * BP + tl.arange(0, BP)
    return (i // blocks).to(tl.int64), (o_n // G).to(tl.int64), (o_n % G).to(tl.int64), o_n < S * G


@triton.jit
def frame_pairs(p_len, i_b, frames, BQ: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr):
    """Query frames that see something [BQ], key frames that someone sees [BK], and who sees whom [1, BQ, BK]."""
    T, T_k, q_start, past, future, chunk, sink = frames
    o_t = tl.arange(0, BQ)
    o_f = tl.arange(0, BK)
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


# ---- Forward ----


@triton.jit(do_not_specialize=["frames", "S", "G"])
def temporal_attention_fwd_kernel(
    q,  # Rows (B, T, S, G*R, D)
    k,  # Rows (B, T_k, S, G, D)
    v,
    p_o,  # (B, T, S, G*R, D), contiguous
    p_lse,  # (B, T, S, G*R), or None
    p_len,  # (B,), or None
    q_norm,
    k_norm,
    p_qstats,  # (B, T, S, 2) with ALL
    p_kstats,
    angles,
    frames,  # T, T_k, q_start, past, future, chunk, sink
    S,
    G,
    exponent,  # scale of the scores, times log2 e
    ROW: tl.constexpr,  # of q and k
    V: tl.constexpr,  # of v and out
    A: tl.constexpr,
    R: tl.constexpr,  # query heads a key/value head
    BP: tl.constexpr,  # lines
    BQ: tl.constexpr,  # frames
    BK: tl.constexpr,
    MASKED: tl.constexpr,
    LINES: tl.constexpr,  # lines turn by angles of their own
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T, T_k, q_start = frames[0], frames[1], frames[2]
    i_b, o_s, o_g, m_n = line_block(tl.program_id(0), S, G, BP)
    o_t = tl.arange(0, BQ)
    o_f = tl.arange(0, BK)
    m_t, m_f, seen = frame_pairs(p_len, i_b, frames, BQ, BK, MASKED)
    b_k = frame_rows(k, i_b, o_s, o_g, o_f, m_n, m_f, A, ROW)  # [BP, BK, W]
    b_v = frame_rows(v, i_b, o_s, o_g, o_f, m_n, m_f, A, V)
    b_q = frame_rows(q, i_b, o_s, o_g * R, o_t, m_n, m_t, A, ROW)  # [BP, BQ, W]
    b_k = normed_turned(
        b_k, k_norm, p_kstats, angles, 0, i_b, T_k, S, o_s, o_g, o_f, m_n, m_f, LINES, ROW, KIND, ALL, STYLE, R2
    )
    for i_r in range(R):
        o_h = o_g * R + i_r
        if R > 1:
            b_q = frame_rows(q, i_b, o_s, o_h, o_t, m_n, m_t, A, ROW)
        b_q = normed_turned(
            b_q, q_norm, p_qstats, angles, q_start, i_b, T, S, o_s, o_h, o_t, m_n, m_t, LINES, ROW, KIND, ALL, STYLE, R2
        )
        b_s = tl.where(seen, inner(b_q, b_k, PRECISION) * exponent, -float("inf"))  # [BP, BQ, BK]
        b_m = tl.max(b_s, 2, keep_dims=True)
        b_m = tl.where(b_m == -float("inf"), 0.0, b_m)
        b_p = tl.exp2(b_s - b_m)
        b_l = tl.sum(b_p, 2, keep_dims=True)  # [BP, BQ, 1]; 0 where a row sees nothing
        b_o = weighted(b_p, b_v, seen, MASKED, PRECISION)
        o_row = (((i_b * T + o_t)[None, :] * S + o_s[:, None]) * G * R) + o_h[:, None]  # [BP, BQ]
        m_row = m_n[:, None] & (o_t < T)[None, :]
        store_rows(p_o, o_row * V.D, m_row, keep(scale(b_o, 1 / b_l), m_t[None, :, None]), V)
        if p_lse is not None:
            b_lse = tl.where(m_t[None, :, None], b_m * 0.6931471805599453 + tl.log(b_l), -float("inf"))
            tl.store(p_lse + o_row[:, :, None], b_lse, mask=m_row[:, :, None])


# ---- Launch ----


def lines_of(table: tuple[TemporalConfig, ...], arch: str, row: Row, BQ: int, BK: int) -> tuple[TemporalConfig, int]:
    """Config and lines a program."""
    line = max(BQ, BK) * row.width
    config = pick(table, arch, lambda c: c.values >= line)
    return config, max(power_of_2(config.values // line + 1) // 2, 1)


def precision(x: Tensor) -> str:
    """float32 is multiplied as float32; half precisions have one way only."""
    return "ieee"


def frames_side(T: int) -> int:
    """A side of a score tile: a tensor-core instruction takes 16 frames."""
    return max(power_of_2(T), 16)


def stats_of(x: Tensor, norm: QKNorm | None) -> Tensor | None:
    """Statistics of a norm over all heads: one pass over x."""
    return row_stats(x, norm) if norm is not None and norm.over == "all" else None


def temporal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
) -> None:
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; fills out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
    B, T, S, H, D = q.shape
    T_k, G = k.shape[1], k.shape[3]
    row = split_row(D, rope)
    numbers, masked = mask_numbers(mask, T, T_k, q_start)
    BQ, BK = frames_side(T), frames_side(T_k)
    config, BP = lines_of(FORWARD, arch_of(q), row, BQ, BK)
    A = step(q, k, v)
    q_norm, norm_constants = norm_arguments(norm, "q")
    k_norm, _ = norm_arguments(norm, "k")
    angles, rope_constants = rope_arguments(rope)
    launch(
        temporal_attention_fwd_kernel,
        B * cdiv(S * G, BP),
        q,
        config,
        *(rows(q, A), rows(k, A), rows(v, A), out, lse, lengths, q_norm, k_norm),
        *(stats_of(q, norm), stats_of(k, norm), angles, (T, T_k, q_start, *numbers), S, G, scale * _LOG2_E),
        ROW=row,
        V=split_row(D),
        A=A,
        R=H // G,
        BP=BP,
        BQ=BQ,
        BK=BK,
        MASKED=masked,
        LINES=rope is not None and rope.cos.shape[1] * (rope.cos.shape[2] if rope.cos.ndim == 4 else 1) > 1,
        PRECISION=precision(q),
        **norm_constants,
        **rope_constants,
    )
