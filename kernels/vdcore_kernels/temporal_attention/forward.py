"""Temporal attention with up to 128 frames a side, forward: positions and heads side by side, each row read once.

Bound by memory: T/2 FLOP per byte. A program holds BP sequences (position, key/value head) of a sample with all their
frames, as a batch of small matrices: q, k and v are read through their strides, normalized and rotated in registers,
and the result is written. Nothing is permuted, and sequences share nothing.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import (
    Shape,
    Side,
    frame_bounds,
    frame_pairs,
    inner,
    load_frames,
    normalized_rotated,
    query_head,
    row_offsets,
    sequence_block,
    weighted,
)
from vdcore_kernels.core.gate import Gate, gated
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import (
    LN_2,
    LOG2_E,
    Row,
    keep,
    norm_arguments,
    norm_rope_constants,
    rope_arguments,
    rows,
    scale,
    split_row,
    store_rows,
)
from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward, row_stats
from vdcore_kernels.temporal_attention.long import temporal_long_forward

MAX_FRAMES = 128

# values: of q, of k and of v each: sequences x frames x channels.
_FLIGHT = "predicted: q, k and v of 5,120 values are 30 KB in flight at 110 registers, so 120 KB per SM"
ONE_SEQUENCE = "one sequence; predicted: its scores and result spread over twice the threads stay clear of spilling"
FORWARD = (
    ValuesConfig("interpreter", 4, 1, "several sequences and several programs in a small case", 4096),
    ValuesConfig("interpreter", 8, 1, ONE_SEQUENCE, 65536),
    ValuesConfig("", 4, 1, _FLIGHT, 5120),
    ValuesConfig("", 8, 1, ONE_SEQUENCE, 8192),
    ValuesConfig("", 8, 1, ONE_SEQUENCE, 16384),
    ValuesConfig("", 8, 1, ONE_SEQUENCE, 32768),
)


@triton.jit(do_not_specialize=["frames", "S", "G"])
def temporal_attention_fwd_kernel(
    q, k, v, gate, p_o, p_lse, p_len, q_norm, k_norm, angles, frames, S, G, exponent, SHAPE: tl.constexpr
):
    """One program: all frames of BP sequences (position, key/value head), R query heads each, one after another.

    q: Rows (B, T, S, G*R, D). k, v: Rows (B, T_k, S, G, D). p_o: (B, T, S, G*R, D), contiguous. p_lse: (B, T, S, G*R),
    or None. p_len: (B,), or None. gate: a Gate that weighs another result, to which this one is added; or None. Norms
    have statistics with ALL. exponent: scale of the scores, times log2 e.
    """
    V: tl.constexpr = SHAPE.V
    ROW: tl.constexpr = SHAPE.ROW
    R: tl.constexpr = SHAPE.R
    T = frames.T
    of_q = Side(q, q_norm, frames.q_start, T)
    at = sequence_block(tl.program_id(0), S, G, SHAPE.BP)
    o_t = tl.arange(0, SHAPE.BQ)
    o_f = tl.arange(0, SHAPE.BK)
    m_t, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
    b_k = load_frames(k, at, o_f, m_f, SHAPE.A, ROW)  # [BP, BK, W]
    b_v = load_frames(v, at, o_f, m_f, SHAPE.A, V)
    b_q = load_frames(q, query_head(at, 0, R), o_t, m_t, SHAPE.A, ROW)  # [BP, BQ, W]
    b_k = normalized_rotated(b_k, Side(k, k_norm, 0, frames.T_k), angles, at, o_f, m_f, S, SHAPE)
    for i_r in range(R):
        head = query_head(at, i_r, R)
        if R > 1:
            b_q = load_frames(q, head, o_t, m_t, SHAPE.A, ROW)
        b_q = normalized_rotated(b_q, of_q, angles, head, o_t, m_t, S, SHAPE)
        b_s = tl.where(seen, inner(b_q, b_k) * exponent, -float("inf"))  # [BP, BQ, BK]
        b_m = tl.max(b_s, 2, keep_dims=True)
        b_m = tl.where(b_m == -float("inf"), 0.0, b_m)
        b_p = tl.exp2(b_s - b_m)
        b_l = tl.sum(b_p, 2, keep_dims=True)  # [BP, BQ, 1]; 0 where a row sees nothing
        b_o = weighted(b_p, b_v, seen, SHAPE.MASKED)
        b_o = keep(scale(b_o, 1 / b_l), m_t[None, :, None])
        o_row = row_offsets(head, o_t, T, S, G * R)  # [BP, BQ]
        m_row = at.m[:, None] & (o_t < T)[None, :]
        if gate is not None:
            b_o = gated(b_o, gate, head, o_t, o_row, m_row, m_row & m_t[None, :], V, SHAPE.GATE_ROWS)
        store_rows(p_o, o_row * V.D, m_row, b_o, V)
        if p_lse is not None:
            b_lse = tl.where(m_t[None, :, None], b_m * LN_2 + tl.log(b_l), -float("inf"))
            tl.store(p_lse + o_row[:, :, None], b_lse, mask=m_row[:, :, None])


def side(T: int) -> int:
    """A side of a score tile: a tensor-core instruction takes 16 frames."""
    return max(power_of_2(T), 16)


def pick_sequences(
    table: tuple[ValuesConfig, ...], q: Tensor, T: int, T_k: int, row: Row, weight: int
) -> tuple[ValuesConfig, int] | None:
    """Config and sequences per program; None where none holds one. ``weight``: registers per value, to a plain one."""
    size = max(side(T), side(T_k)) * row.width * weight * q.element_size() // 2
    arch = arch_of(q)
    if max(T, T_k) > MAX_FRAMES or not any(c.serves(arch) and c.values >= size for c in table):
        return None
    config = pick(table, arch, lambda c: c.values >= size)
    return config, how_many(config.values, size)


def rope_per_sequence(rope: Rope | None) -> bool:
    """Whether angles vary with the position or the head."""
    return rope is not None and rope.cos.shape[1] * (rope.cos.shape[2] if rope.cos.ndim == 4 else 1) > 1


def temporal_arguments(
    q: Tensor,
    k: Tensor,
    *,
    row: Row,
    A: int,
    BP: int,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """What the kernels of both directions take by the same names."""
    (_, T, S, H, D), T_k, G = q.shape, k.shape[1], k.shape[3]
    frames, masked = frame_bounds(mask, T, T_k, q_start, q.device)
    q_stats, k_stats = (row_stats(x, norm) for x in (q, k))
    shape = Shape(
        ROW=row,
        V=split_row(D),
        A=A,
        R=H // G,
        BP=BP,
        BQ=side(T),
        BK=side(T_k),
        MASKED=masked,
        GATE_ROWS=gate is not None and gate.d != 0,
        PER_SEQUENCE=rope_per_sequence(rope),
        NR=norm_rope_constants(norm, rope),
    )
    norms = {"q_norm": norm_arguments(norm, "q", q_stats), "k_norm": norm_arguments(norm, "k", k_stats)}
    angles = rope_arguments(rope)
    return {"p_len": lengths, **norms, "angles": angles, "frames": frames, "S": S, "G": G, "SHAPE": shape}


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
    sm_scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
    gate: Gate | None = None,
) -> None:
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; fills out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``.

    With a gate, out becomes ``gate * gate.a + (1 - gate) * temporal attention``; it may be ``gate.a`` itself.
    """
    T, T_k = q.shape[1], k.shape[1]
    row = split_row(q.shape[4], rope)
    frames: dict[str, Any] = {"mask": mask, "q_start": q_start, "lengths": lengths}
    _, masked = frame_bounds(mask, T, T_k, q_start)
    # A mask's numbers lie in registers beside the rows, two runs' of them under teacher forcing: found by compiling.
    found = pick_sequences(FORWARD, q, T, T_k, row, (5 if mask.clean else 3) if masked else 1)
    if found is None:
        q, k = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        return temporal_long_forward(q, k, v, out, lse, sm_scale=sm_scale, gate=gate, **frames)
    config, BP = found
    A = step(q, k, v)
    launch(
        temporal_attention_fwd_kernel,
        q.shape[0] * cdiv(q.shape[2] * k.shape[3], BP),
        like=q,
        config=config,
        q=rows(q, A),
        k=rows(k, A),
        v=rows(v, A),
        gate=gate,
        p_o=out,
        p_lse=lse,
        exponent=sm_scale * LOG2_E.value,
        **temporal_arguments(q, k, row=row, A=A, BP=BP, norm=norm, rope=rope, gate=gate, **frames),
    )
