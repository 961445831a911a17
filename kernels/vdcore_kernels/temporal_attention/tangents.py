"""Temporal attention, forward-mode derivatives: of out and lse, from those of q, k and v.

By the formula of frame attention's (frame_attention/tangents.py), with P from forward's lse. A program holds a block of
query frames of BP sequences (position, head) and walks through the blocks of key frames that these see: one block where
a sequence's frames fit, and then several sequences. q and k come normalized and rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import (
    Frames,
    Sequences,
    finite_rows,
    frame_bounds,
    frame_pairs,
    inner,
    load_frames,
    poisoned,
    row_offsets,
    sequence_block,
    transposed,
    weighted,
)
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, step
from vdcore_kernels.core.tile import (
    LOG2_E,
    Row,
    Rows,
    add,
    keep,
    load_rows,
    materialize_before_dot,
    rows,
    scale,
    split_row,
    store_rows,
    to,
    zeros,
)
from vdcore_kernels.temporal_attention.forward import side
from vdcore_kernels.temporal_attention.long import block_at, key_blocks


@dataclass(frozen=True)
class TangentConfig(ValuesConfig):
    """values: of each of six tensors that a program holds, as `_weight` counts them. block: frames of a side of a score
    tile, at most.

    loops: one sequence a program, and more frames than a block's.
    """

    block: int = 16
    loops: bool = False


# Found by compiling: q, k, v, their tangents and the result lie in registers, so a program holds less than forward's.
TANGENTS = (
    TangentConfig("interpreter", 4, 1, "several sequences and several programs in a small case", 8192, 64),
    TangentConfig("interpreter", 4, 1, "several blocks in a small case", 2**20, 64, True),
    TangentConfig("", 4, 1, "2,048 values of seven tensors over four warps: 180 registers", 2048),
    TangentConfig("", 8, 1, "one sequence of many channels, or under a mask", 4096),
    TangentConfig("sm_80|sm_9|sm_1|gfx", 8, 1, "32 frames a side of up to 128 channels; 64 spill", 4096, 32, True),
    TangentConfig("", 8, 1, "more channels, a mask's numbers beside them, or sm_89: 32 frames spill", 2**20, 16, True),
)


def _weight(row: Row, size: int, mask: FrameMask, masked: bool) -> int:
    """Registers of a value, to those of a dense call of 16 bits: float32's products, a mask, a second tile."""
    return (4 if size == 4 else 1) * (2 if masked else 1) * (2 if mask.clean else 1) * (2 if row.W1 else 1)


class TangentShape(NamedTuple):
    """Constants: rows and elements per step of a stride, query heads per key/value head, sequences of a program, query
    and key frames of a block."""

    ROW: Row
    A: int
    R: int
    BP: int
    BQ: int
    BK: int
    MASKED: bool


@triton.jit
def _load(x, at, o_t, m_t, SHAPE: tl.constexpr):
    """Rows [BP, BT, W] of sequences at frames o_t."""
    ROW: tl.constexpr = SHAPE.ROW
    A: tl.constexpr = SHAPE.A
    b_x = load_frames(x, at, o_t, m_t, A, ROW)
    if SHAPE.BP > 1:
        b_x = materialize_before_dot(b_x)
    return b_x


@triton.jit
def _moved(b_shift, b_q, b_dq, b_k, b_p, seen, k, at_k, o_f, m_f, dq, dk, sm_scale, SHAPE: tl.constexpr):
    """P (E - shift) [BP, BQ, BK], and the shift: E's mean over the first block that a row sees, infinite before."""
    b_e = tl.full([SHAPE.BP, SHAPE.BQ, SHAPE.BK], 0.0, tl.float32)
    if dq.p is not None:
        b_e += inner(b_dq, b_k)
    if dk.p is not None:
        b_e += inner(b_q, _load(dk, at_k, o_f, m_f, SHAPE))
    b_e = tl.where(seen, b_e * sm_scale, 0.0)
    b_n = tl.sum(seen.to(tl.float32), 2, keep_dims=True)  # [1, BQ, 1]
    b_mean = tl.sum(b_e, 2, keep_dims=True) / b_n
    b_mean += b_mean - b_mean  # NaN where it is infinite
    b_shift = tl.where((b_shift == float("inf")) & (b_n > 0.0), b_mean, b_shift)
    return tl.where(seen, b_p * (b_e - b_shift), 0.0), b_shift


@triton.jit(do_not_specialize=[*Frames._fields, "S", "H", "blocks"])
def temporal_attention_jvp_kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    p_o,
    p_lse,
    p_do,
    p_dlse,
    p_len,
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
    H,
    blocks,
    sm_scale,
    SHAPE: tl.constexpr,
):
    """One program: BQ query frames of BP sequences (position, head) of a sample, and all key frames that these see.

    q: Rows (B, T, S, H, D). k, v: Rows (B, T_k, S, H/R, D). dq, dk, dv: as these, or with pointers that are None. p_o,
    p_do: (B, T, S, H, D), contiguous. p_lse, p_dlse: (B, T, S, H). blocks: of query frames. A row that sees a value
    which is not finite may become NaN as a whole; hidden values never matter.
    """
    ROW: tl.constexpr = SHAPE.ROW
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    i_q = tl.program_id(0) % blocks
    at = sequence_block(tl.program_id(0) // blocks, S, H, SHAPE.BP)
    at_k = Sequences(at.b, at.s, at.h // SHAPE.R, at.m)
    o_t = i_q * SHAPE.BQ + tl.arange(0, SHAPE.BQ)
    m_t = o_t < T
    m_row = at.m[:, None] & m_t[None, :]
    o_row = row_offsets(at, o_t, T, S, H)  # [BP, BQ]
    b_q = _load(q, at, o_t, m_t, SHAPE)
    b_dq = (0.0,)
    if dq.p is not None:
        b_dq = _load(dq, at, o_t, m_t, SHAPE)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0)[:, :, None] * LOG2_E
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)  # all scores -inf: 2 ** (-inf - 0) is 0, not NaN
    b_o = zeros(SHAPE.BP, SHAPE.BQ, ROW)
    b_sum = tl.full([SHAPE.BP, SHAPE.BQ, 1], 0.0, tl.float32)
    b_terms = tl.full([SHAPE.BP, SHAPE.BQ, 1], 0.0, tl.float32)
    b_shift = tl.full([SHAPE.BP, SHAPE.BQ, 1], float("inf"), tl.float32)
    blocks_k = key_blocks(p_len, at.b, i_q, frames, SHAPE.BQ, SHAPE.BK)
    for i in range(blocks_k.n_low + blocks_k.n_run):
        o_f = block_at(i, blocks_k) * SHAPE.BK + tl.arange(0, SHAPE.BK)
        m_s, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
        b_k = _load(k, at_k, o_f, m_f, SHAPE)
        b_p = tl.where(seen, tl.exp2(inner(b_q, b_k) * (sm_scale * LOG2_E) - b_lse), 0.0)
        if dq.p is not None or dk.p is not None:
            # What is not finite and seen has come into out, which makes the row NaN.
            b_v, _ = finite_rows(_load(v, at_k, o_f, m_f, SHAPE), SHAPE.MASKED)
            b_pe, b_shift = _moved(b_shift, b_q, b_dq, b_k, b_p, seen, k, at_k, o_f, m_f, dq, dk, sm_scale, SHAPE)
            b_sum += tl.sum(b_pe, 2, keep_dims=True)
            b_terms += tl.sum(b_pe.to(b_v[0].dtype).to(tl.float32), 2, keep_dims=True)
            b_o = add(b_o, weighted(b_pe, b_v))
        if dv.p is not None:
            b_dv, flag = finite_rows(_load(dv, at_k, o_f, m_f, SHAPE), SHAPE.MASKED)
            if SHAPE.MASKED:
                b_p = poisoned(b_p, transposed(flag), seen, 0.0)
            b_o = add(b_o, weighted(b_p, b_dv))
    none = b_shift == float("inf")
    if dq.p is not None or dk.p is not None:
        out = to(load_rows(p_o, o_row * ROW.D, m_row, ROW), tl.float32)
        b_o = keep(add(b_o, scale(out, -b_terms)), ~none)
    store_rows(p_do, o_row * ROW.D, m_row, b_o, ROW)
    tl.store(p_dlse + o_row[:, :, None], tl.where(none, 0.0, b_sum + b_shift), mask=m_row[:, :, None])


def temporal_tangents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    dout: Tensor,
    dlse: Tensor,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    sm_scale: float,
) -> None:
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``, normalized and rotated; fills the tangents of forward's out
    and lse, from those of q, k and v, each of the dtype of its tensor, or None.
    """
    (B, T, S, H, D), T_k = q.shape, k.shape[1]
    row, frames = split_row(D), max(side(T), side(T_k))
    bounds, masked = frame_bounds(mask, T, T_k, q_start, q.device)
    size = row.width * _weight(row, q.element_size(), mask, masked)
    config = pick(
        TANGENTS,
        arch_of(q),
        lambda c: c.values >= min(frames, c.block) * size and (frames <= c.block or c.loops),
    )
    BQ, BK = min(side(T), config.block), min(side(T_k), config.block)
    BP = 1 if config.loops else how_many(config.values, frames * size)
    A = step(q, k, v, *(x for x in tangents if x is not None))
    sides: list[Any] = [Rows(None, 0, 0, 0, 0) if x is None else rows(x, A) for x in (q, k, v, *tangents)]
    blocks = cdiv(T, BQ)
    launch(
        temporal_attention_jvp_kernel,
        B * cdiv(S * H, BP) * blocks,
        like=q,
        config=config,
        **dict(zip(("q", "k", "v", "dq", "dk", "dv"), sides)),
        p_o=out,
        p_lse=lse,
        p_do=dout,
        p_dlse=dlse,
        p_len=lengths,
        S=S,
        H=H,
        blocks=blocks,
        sm_scale=sm_scale,
        SHAPE=TangentShape(row, A, H // k.shape[3], BP, BQ, BK, masked),
        **bounds._asdict(),
    )
