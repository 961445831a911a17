"""Temporal attention with up to 128 frames a side, forward: positions and heads side by side, each row read once.

Bound by memory: T/2 FLOP per byte. A program holds BP sequences (position, key/value head) of a sample with all their
frames, as a batch of small matrices: q, k and v are read through their strides, normalized and rotated in registers,
and the result is written. Nothing is permuted, and sequences share nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import (
    Frames,
    Shape,
    Side,
    finite_rows,
    frame_bounds,
    frame_pairs,
    inner,
    load_frame_angles,
    load_frames,
    load_turn,
    normalized,
    poisoned,
    query_head,
    rotated,
    row_offsets,
    sequence_block,
    transposed,
    weighted,
)
from vdcore_kernels.core.gate import Gate, gate_of, load_mixed, mix
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2
from vdcore_kernels.core.tile import (
    LN_2,
    LOG2_E,
    Row,
    aligned_rows,
    materialize_before_dot,
    norm_arguments,
    norm_rope_constants,
    rope_arguments,
    rope_per_head,
    scale,
    split_row,
    store_rows,
    to,
)
from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward, row_stats
from vdcore_kernels.temporal_attention.long import temporal_long_forward

MAX_FRAMES = 128

# values: of q, of k and of v each: sequences x frames x channels. Found by compiling (bench/results/machine_code): two
# warps that hold 30 KB repeat less of one another's work than four, and leave 150 KB of a multiprocessor in flight.
_LOADS = "5,120 values: 40 loads of 16 bytes a thread at most, before the first barrier"
ONE_SEQUENCE = "one sequence, over so many threads that its scores and result do not spill"
FORWARD = (
    ValuesConfig("interpreter", 4, 1, "several sequences and several programs in a small case", 4096),
    ValuesConfig("interpreter", 8, 1, ONE_SEQUENCE, 65536),
    ValuesConfig("", 2, 1, _LOADS, 5120),
    ValuesConfig("", 8, 1, ONE_SEQUENCE, 8192),
    ValuesConfig("sm_9|sm_10|gfx", 8, 1, ONE_SEQUENCE, 16384),
)


@triton.jit
def _powers(b_s):
    """2 ** (scores less their row's largest), which is 0 where nothing is seen, and their sums: [BP, BQ, 1]."""
    b_m = tl.max(b_s, 2, keep_dims=True)
    b_m = tl.where(b_m == -float("inf"), 0.0, b_m)
    b_p = tl.exp2(b_s - b_m)
    return b_p, b_m, tl.sum(b_p, 2, keep_dims=True)


@triton.jit
def _load_head(of_q, gate, head, o_t, m_t, H, SHAPE: tl.constexpr):
    """Of one query head q [BP, BQ, W], the gate, and the result that it weighs."""
    A: tl.constexpr = SHAPE.A
    ROW: tl.constexpr = SHAPE.ROW
    b_q = materialize_before_dot(load_frames(of_q.x, head, o_t, m_t, A, ROW))
    b_g, b_a = 0.0, 0.0
    if gate is not None:
        o_row, m_row = row_offsets(head, o_t, of_q.T, of_q.S, H), head.m[:, None] & (o_t < of_q.T)[None, :]
        b_g, b_a = load_mixed(gate, head, o_t, o_row, m_row, m_row & m_t[None, :], SHAPE)
    return b_q, b_g, b_a


@triton.jit(do_not_specialize=[*Frames._fields, "S", "G"])
def temporal_attention_fwd_kernel(
    q,
    k,
    v,
    gate,
    p_o,
    p_lse,
    p_len,
    q_norm,
    k_norm,
    angles,
    T,
    T_k,
    q_start,
    past,
    future,
    chunk,
    sink,
    group,
    clean,
    shots,
    S,
    G,
    exponent,
    SHAPE: tl.constexpr,
):
    """One program: all frames of BP sequences (position, key/value head), R query heads each, one after another.

    q: Rows (B, T, S, G*R, D). k, v: Rows (B, T_k, S, G, D). p_o: (B, T, S, G*R, D), contiguous. p_lse: (B, T, S, G*R),
    or None. p_len: (B,), or None. gate: a Gate that weighs another result, to which this one is added; or None. Norms
    have statistics with ALL. exponent: scale of the scores, times log2 e. A row that sees a value which is not finite
    may become NaN as a whole; hidden values never matter.
    """
    ROW: tl.constexpr = SHAPE.ROW
    V: tl.constexpr = SHAPE.V
    A: tl.constexpr = SHAPE.A
    R: tl.constexpr = SHAPE.R
    NR: tl.constexpr = SHAPE.NR
    dtype: tl.constexpr = q.p.dtype.element_ty
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    of_q, of_k = Side(q, q_norm, angles, q_start, T, S), Side(k, k_norm, angles, 0, T_k, S)
    at = sequence_block(tl.program_id(0), S, G, SHAPE.BP)
    head = query_head(at, 0, R)
    o_t, o_f = tl.arange(0, SHAPE.BQ), tl.arange(0, SHAPE.BK)
    m_t, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)

    # All that is read is on its way before anything waits: a barrier in between is a second trip to memory.
    b_k = materialize_before_dot(load_frames(k, at, o_f, m_f, A, ROW))  # [BP, BK, W]
    b_v = materialize_before_dot(load_frames(v, at, o_f, m_f, A, V))
    b_q, b_g, b_a = _load_head(of_q, gate, head, o_t, m_t, G * R, SHAPE)
    k_angles = load_frame_angles(of_k, at, o_f, m_f, SHAPE)
    q_angles = k_angles if SHAPE.SAME else load_frame_angles(of_q, head, o_t, m_t, SHAPE)
    k_turn, q_turn = load_turn(of_k, at, o_f, m_f, SHAPE), load_turn(of_q, head, o_t, m_t, SHAPE)

    if NR.KIND > 0 or NR.STYLE > 0:
        b_k = rotated(normalized(b_k, k_turn, k_norm, at.m[:, None] & m_f[None, :], SHAPE), k_angles, dtype, NR)
    b_v, v_flag = finite_rows(b_v, SHAPE.MASKED)
    for i_r in range(R):
        if R > 1:
            head = query_head(at, i_r, R)
            b_q, b_g, b_a = _load_head(of_q, gate, head, o_t, m_t, G * R, SHAPE)
            q_turn = load_turn(of_q, head, o_t, m_t, SHAPE)
            if not SHAPE.SAME:
                q_angles = load_frame_angles(of_q, head, o_t, m_t, SHAPE)
        if NR.KIND > 0 or NR.STYLE > 0:
            b_q = rotated(normalized(b_q, q_turn, q_norm, at.m[:, None] & m_t[None, :], SHAPE), q_angles, dtype, NR)
        b_s = tl.where(seen, inner(b_q, b_k) * exponent, -float("inf"))  # [BP, BQ, BK]
        b_p, b_m, b_l = _powers(b_s)
        if SHAPE.MASKED:
            b_p = poisoned(b_p, transposed(v_flag), seen, 0.0)
        b_o = scale(weighted(b_p, b_v), tl.where(b_l == 0.0, 0.0, 1 / b_l))
        o_row, m_row = row_offsets(head, o_t, T, S, G * R), at.m[:, None] & (o_t < T)[None, :]  # [BP, BQ]
        if gate is not None:
            if SHAPE.GATE_ROWS:  # loaded beside q, k and v they would spill
                b_g = gate_of(gate, head, o_t, m_row & m_t[None, :], V, SHAPE.GATE_ROWS)
            b_o = mix(b_g, to(b_a, tl.float32), b_o)
        store_rows(p_o, o_row * V.D, m_row, b_o, V)
        if p_lse is not None:
            b_lse = tl.where(b_l == 0.0, -float("inf"), b_m * LN_2 + tl.log(b_l))
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


def _weight(norm: QKNorm | None, rope: Rope | None, arch: str) -> int:
    """Of norm and rope: found by compiling, float32 rows and tables spill beside as many values elsewhere."""
    halves = rope is not None and rope.style == "half"
    return 2 if halves or ((norm or rope) and not arch.startswith(("sm_9", "sm_10"))) else 1


def rope_per_sequence(rope: Rope | None) -> bool:
    """Whether angles vary with the position or the head."""
    return rope is not None and (rope.cos.shape[1] > 1 or rope_per_head(rope))


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
    gate_rows: bool = False,
    gate_frames: bool = False,
    same_angles: bool = False,
) -> dict[str, Any]:
    """What the kernels of both directions take by the same names."""
    NR = norm_rope_constants(norm, rope)
    numbers = _numbers(
        q.shape[1:],
        k.shape[1:],
        mask,
        q_start,
        q.device,
        ROW=row,
        A=A,
        BP=BP,
        GATE_ROWS=gate_rows,
        GATE_FRAMES=gate_frames,
        PER_SEQUENCE=rope_per_sequence(rope),
        SAME=same_angles,
        NR=NR,
    )
    return {"p_len": lengths, **numbers}


@lru_cache(maxsize=1024)
def _numbers(
    q: tuple[int, ...], k: tuple[int, ...], mask: FrameMask, q_start: int, device: torch.device, **constants: Any
) -> dict[str, Any]:
    """All arguments but tensors, of q (T, S, H, D) and k (T_k, S, G, D): kept, since Python's time is eager mode's."""
    (T, S, H, D), (T_k, _, G, _) = q, k
    frames, masked = frame_bounds(mask, T, T_k, q_start, device)
    shape = Shape(V=split_row(D), R=H // G, BQ=side(T), BK=side(T_k), MASKED=masked, **constants)
    return {**frames._asdict(), "S": S, "G": G, "SHAPE": shape}


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
    gate_rows = gate is not None and gate.d != 0
    # Two runs' numbers under teacher forcing, or a gate's channels, lie in registers beside the rows: by compiling.
    weight = max(_weight(norm, rope, arch_of(q)), 2 if mask.clean or gate_rows else 1)
    found = pick_sequences(FORWARD, q, T, T_k, row, weight)
    if found is None:
        if norm is not None or rope is not None:
            q, k = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        return temporal_long_forward(q, k, v, out, lse, sm_scale=sm_scale, gate=gate, **frames)
    config, BP = found
    A, (q_rows, k_rows, v_rows) = aligned_rows(q, k, v)
    # A video that comes frame by frame has no kernel of its own for its first frames.
    same_angles = T_k == T and q_start == 0 and mask == FrameMask.full() and not rope_per_head(rope)
    shared = temporal_arguments(
        q, k, row=row, A=A, BP=BP, norm=norm, rope=rope, gate_rows=gate_rows, same_angles=same_angles, **frames
    )
    launch(
        temporal_attention_fwd_kernel,
        q.shape[0] * cdiv(q.shape[2] * k.shape[3], BP),
        like=q,
        config=config,
        q=q_rows,
        k=k_rows,
        v=v_rows,
        gate=gate,
        p_o=out,
        p_lse=lse,
        q_norm=norm_arguments(norm, "q", row_stats(q, norm)),
        k_norm=norm_arguments(norm, "k", row_stats(k, norm)),
        angles=rope_arguments(rope),
        exponent=sm_scale * LOG2_E.value,
        **shared,
    )
