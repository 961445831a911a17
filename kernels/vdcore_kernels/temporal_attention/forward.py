"""Temporal attention with up to 128 frames a side, forward: positions and heads side by side, each row read once.

Bound by memory: T/2 FLOP a byte forward. A program holds BP lines (position, key/value head) of a sample with all their
frames, as a batch of small matrices: q, k and v are read through their strides, normed and rotated in registers, and
the result is written. Nothing is permuted, and lines share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import mask_numbers
from vdcore_kernels.core.gate import Gate, load_gate, mix
from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick, power_of_2, step
from vdcore_kernels.core.products import inner, weighted
from vdcore_kernels.core.sequences import (
    frame_pairs,
    frame_rows,
    line_block,
    normed_turned,
)
from vdcore_kernels.core.tile import (
    Row,
    keep,
    load_rows,
    norm_arguments,
    rope_arguments,
    rows,
    scale,
    split_row,
    store_rows,
    to,
)
from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward, row_stats
from vdcore_kernels.temporal_attention.long import temporal_long_forward

MAX_FRAMES = 128
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class TemporalConfig(Config):
    """values: of q, of k and of v each, that a program holds at a time: lines x frames x channels."""

    values: int = 5120


_FLIGHT = "predicted: q, k and v of 5,120 values are 30 KB in flight at 110 registers, so 120 KB an SM"
LINE = "one line; predicted: its scores and result spread over twice the threads stay clear of spilling"
FORWARD = (
    TemporalConfig("interpreter", 4, 1, "several lines and several programs in a small case", 4096),
    TemporalConfig("interpreter", 8, 1, LINE, 65536),
    TemporalConfig("", 4, 1, _FLIGHT, 5120),
    TemporalConfig("", 8, 1, LINE, 8192),
    TemporalConfig("", 8, 1, LINE, 16384),
    TemporalConfig("", 8, 1, LINE, 32768),
)

# ---- Forward ----


@triton.jit(do_not_specialize=["frames", "S", "G"])
def temporal_attention_fwd_kernel(
    q,  # Rows (B, T, S, G*R, D)
    k,  # Rows (B, T_k, S, G, D)
    v,
    gate,  # Gate: it weighs another result, and this one is added; or None
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
    GATE_ROWS: tl.constexpr,  # the gate varies with the channel
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
    m_t, m_f, seen = frame_pairs(p_len, i_b, frames, o_t, o_f, MASKED)
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
        b_o = keep(scale(b_o, 1 / b_l), m_t[None, :, None])
        o_row = (((i_b * T + o_t)[None, :] * S + o_s[:, None]) * G * R) + o_h[:, None]  # [BP, BQ]
        m_row = m_n[:, None] & (o_t < T)[None, :]
        if gate is not None:
            b_a = to(load_rows(gate.a, o_row * V.D, m_row, V), tl.float32)
            o_gate = (o_s * gate.s + o_h * gate.h)[:, None] + (o_t.to(tl.int64) * gate.t)[None, :]
            b_g = load_gate(gate.p + i_b * gate.b, o_gate, m_row & m_t[None, :], gate.d, V, GATE_ROWS)
            b_o = mix(b_g, b_a, b_o)
        store_rows(p_o, o_row * V.D, m_row, b_o, V)
        if p_lse is not None:
            b_lse = tl.where(m_t[None, :, None], b_m * 0.6931471805599453 + tl.log(b_l), -float("inf"))
            tl.store(p_lse + o_row[:, :, None], b_lse, mask=m_row[:, :, None])


# ---- Launch ----


def side(T: int) -> int:
    """A side of a score tile: a tensor-core instruction takes 16 frames."""
    return max(power_of_2(T), 16)


def pick_lines(
    table: tuple[TemporalConfig, ...], q: Tensor, T: int, T_k: int, row: Row, weight: int
) -> tuple[TemporalConfig, int] | None:
    """Config and lines a program; None where none holds a line. ``weight``: registers a value takes, to a plain one."""
    line = max(side(T), side(T_k)) * row.width * weight * q.element_size() // 2
    arch = arch_of(q)
    if max(T, T_k) > MAX_FRAMES or not any(c.serves(arch) and c.values >= line for c in table):
        return None
    config = pick(table, arch, lambda c: c.values >= line)
    return config, max(power_of_2(config.values // line + 1) // 2, 1)


def _stats(x: Tensor, norm: QKNorm | None) -> Tensor | None:
    """Statistics of a norm over all heads: one pass over x."""
    return row_stats(x, norm) if norm is not None and norm.over == "all" else None


def turns_by_line(rope: Rope | None) -> bool:
    return rope is not None and rope.cos.shape[1] * (rope.cos.shape[2] if rope.cos.ndim == 4 else 1) > 1


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
    gate: Gate | None = None,
) -> None:
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; fills out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``.

    With a gate, out becomes ``gate * gate.a + (1 - gate) * temporal attention``; it may be ``gate.a`` itself.
    """
    B, T, S, H, D = q.shape
    T_k, G = k.shape[1], k.shape[3]
    row = split_row(D, rope)
    numbers, masked = mask_numbers(mask, T, T_k, q_start)
    found = pick_lines(FORWARD, q, T, T_k, row, 3 if masked else 1)
    if found is None:
        q, k = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        return temporal_long_forward(
            q, k, v, out, lse, mask=mask, q_start=q_start, lengths=lengths, scale=scale, gate=gate
        )
    config, BP = found
    A = step(q, k, v)
    q_norm, norm_constants = norm_arguments(norm, "q")
    k_norm, _ = norm_arguments(norm, "k")
    angles, rope_constants = rope_arguments(rope)
    launch(
        temporal_attention_fwd_kernel,
        B * cdiv(S * G, BP),
        q,
        config,
        *(rows(q, A), rows(k, A), rows(v, A), gate),
        *(out, lse, lengths, q_norm, k_norm, _stats(q, norm), _stats(k, norm), angles),
        *((T, T_k, q_start, *numbers), S, G, scale * LOG2_E.value),
        ROW=row,
        V=split_row(D),
        A=A,
        R=H // G,
        BP=BP,
        BQ=side(T),
        BK=side(T_k),
        MASKED=masked,
        LINES=turns_by_line(rope),
        GATE_ROWS=gate is not None and gate.d != 0,
        PRECISION="ieee",
        **norm_constants,
        **rope_constants,
    )
