"""Temporal attention over more frames than fit in registers: a loop over blocks of them, and two kernels backward.

From a hundred frames on it is bound by arithmetic as much as by memory; q and k come normalized and rotated. A program
holds one sequence (position, head) and a block of its frames; blocks that no row of it sees are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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
    is_seen,
    load_dlse,
    load_frames,
    noisy_seeing_run,
    poisoned,
    row_offsets,
    seeing_run,
    store_frames,
    transposed,
    valid_frames,
    visible_runs,
    weighted,
)
from vdcore_kernels.core.gate import Gate, gated
from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import (
    LN_2,
    LOG2_E,
    Row,
    add,
    keep,
    load_rows,
    mul,
    row_sum,
    rows,
    scale,
    split_row,
    store_rows,
    to,
    zeros,
)


@dataclass(frozen=True)
class LongConfig(Config):
    """block: frames a side of a score tile, for rows of at most ``channels``, as `_cost` counts them."""

    block: int = 64
    channels: int = 256


_INTERPRETED = LongConfig("interpreter", 4, 1, "several blocks in a small case", 64, 1024)
_SMALL = "sm_8|sm_11|sm_12"
_LARGE = "sm_9|sm_10|gfx"
_LESS = "more channels, or a mask's numbers beside them, leave room for fewer frames"
FORWARD = (
    _INTERPRETED,
    LongConfig(_SMALL, 4, 2, "64 frames a side; more channels spill", 64, 64),
    LongConfig(_SMALL, 8, 1, _LESS, 32, 512),
    LongConfig(_LARGE, 4, 2, "64 frames a side fill a warpgroup's instruction; keys come from the L2", 64, 128),
    LongConfig(_LARGE, 8, 1, "the accumulator of 256 channels over twice the threads", 64, 256),
    LongConfig(_LARGE, 8, 1, _LESS, 32, 512),
    LongConfig("", 8, 1, _LESS, 16, 1024),
)
BACKWARD = (
    _INTERPRETED,
    LongConfig(_SMALL, 4, 1, "two accumulators of 32 frames; 64 spill", 32, 64),
    LongConfig(_SMALL, 8, 1, "two accumulators of 32 frames; 64 spill", 32, 144),
    LongConfig(_LARGE, 4, 1, "two accumulators of 64 frames", 64, 64),
    LongConfig(_LARGE, 8, 1, "two accumulators of 64 frames over twice the threads", 64, 144),
    LongConfig("", 8, 1, _LESS, 32, 192, registers=255),
    LongConfig("", 8, 1, _LESS, 16, 1024),
)


def _row(D: int, masked: bool) -> Row:
    """One tile where a mask leaves no registers for two; two equal ones where it is too wide."""
    if not masked:
        return split_row(D)
    return Row(D, D, max(power_of_2(D), 16)) if D <= 128 else Row(D, 128, 128, max(power_of_2(D - 128), 16))


def _cost(row: Row, masked: bool) -> int:
    """Registers of a row, to those of a plain channel: a mask's, and a second tile's, are found by compiling."""
    return row.width * (3 if masked else 1) + (64 if row.W1 else 0)


class LongShape(NamedTuple):
    """Constants: rows and elements per step of a stride, query heads per key/value head, frames of a block."""

    ROW: Row
    A: int
    R: int
    BT: int
    MASKED: bool
    GATE_ROWS: bool


@triton.jit
def _sequence(i, S, H, blocks):
    """Of the i-th program: its block of frames and its sequence."""
    i_n = i // blocks
    one = tl.arange(0, 1)
    o_s, o_h = (i_n // H % S + one).to(tl.int64), (i_n % H + one).to(tl.int64)
    return i % blocks, Sequences((i_n // H // S).to(tl.int64), o_s, o_h, o_s < S)


@triton.jit
def _key_head(at, R: tl.constexpr):
    return Sequences(at.b, at.s, at.h // R, at.m)


@triton.jit
def key_blocks(p_len, i_b, i_q, frames, BQ: tl.constexpr, BK: tl.constexpr):
    """Blocks of keys that a block of queries sees, as Blocks."""
    valid, last = valid_frames(p_len, i_b, frames)
    first_q = frames.q_start + i_q * BQ
    last_q = tl.minimum(first_q + BQ, last) - 1
    low, first_end, begin, _ = visible_runs(first_q, valid, frames)
    _, low_end, _, end = visible_runs(last_q, valid, frames)
    if frames.clean is not None:
        both = (first_q < frames.clean) & (last_q >= frames.clean)  # the last clean frames and the first noisy ones
        half = tl.minimum(frames.clean, valid)
        low, low_end, begin = tl.where(both, 0, low), tl.where(both, half, low_end), tl.where(both, half, begin)
    if frames.shots is not None:
        low_end = first_end  # shots that begin later are in the window of the first query, or behind it
    alive = (last_q >= first_q) & (valid > 0)
    return _blocks(low, low_end, begin, end, alive, BK)


class Blocks(NamedTuple):
    """Blocks of frames: n_low from ``low`` on and n_run from ``start`` on."""

    n_low: Any
    n_run: Any
    low: Any
    start: Any


@triton.jit
def _blocks(low, low_end, begin, end, alive, BT: tl.constexpr):
    """Blocks of BT frames that hold [low, low_end) and [begin, end), each once."""
    start = begin // BT
    n_low = tl.maximum(tl.minimum(tl.cdiv(low_end, BT), start) - low // BT, 0)
    n_run = tl.maximum(tl.cdiv(end, BT) - start, 0)
    return Blocks(tl.where(alive, n_low, 0), tl.where(alive, n_run, 0), low // BT, start)


@triton.jit
def block_at(i, blocks):
    return tl.where(i < blocks.n_low, blocks.low + i, blocks.start + i - blocks.n_low)


@triton.jit
def _query_blocks(p_len, i_b, i_k, frames, BT: tl.constexpr):
    """Blocks of queries, from q_start on, that see a block of keys."""
    valid, last = valid_frames(p_len, i_b, frames)
    first_k = i_k * BT
    begin, end_first = seeing_run(first_k, last, frames)
    low, low_end = frames.q_start + 0, frames.q_start + 0
    if frames.clean is None and frames.shots is None:
        _, end_last = seeing_run(first_k + BT - 1, last, frames)
        end = tl.maximum(end_first, end_last)
    else:
        o_k = first_k + tl.arange(0, BT)
        o_begin, o_end = seeing_run(o_k, last, frames)
        o_end = tl.where((o_k < valid) & (o_begin < o_end), o_end, 0)
        end = tl.max(o_end)
        if frames.clean is not None:  # low: the clean ones; all noisy ones see noisy keys, or clean ones, of this block
            is_clean = o_k < frames.clean
            low, low_end = begin, tl.max(tl.where(is_clean, o_end, 0))
            n_begin, n_end = noisy_seeing_run(o_k, last, frames)
            n_end = tl.where((o_k < valid) & (n_begin < n_end), n_end, 0)
            nowhere = last + BT
            n_begin = tl.where(n_end > 0, n_begin, nowhere)
            n_begin = tl.where(is_clean, n_begin, tl.where(o_end > 0, o_begin, nowhere))
            begin, end = tl.min(n_begin), tl.maximum(tl.max(n_end), tl.max(tl.where(is_clean, 0, o_end)))
    q = frames.q_start
    return _blocks(low - q, low_end - q, begin - q, end - q, first_k < valid, BT)


@triton.jit(do_not_specialize=[*Frames._fields, "S", "H", "blocks"])
def temporal_long_fwd_kernel(
    q,
    k,
    v,
    gate,
    p_o,
    p_lse,
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
    exponent,
    SHAPE: tl.constexpr,
):
    """One program: BT query frames of one sequence (position, head), and all key frames that these see.

    q: Rows (B, T, S, H, D). k, v: Rows (B, T_k, S, H/R, D). p_o: (B, T, S, H, D), contiguous. p_lse: (B, T, S, H), or
    None. blocks: of query frames. gate, exponent: as temporal_attention_fwd_kernel's.
    """
    ROW: tl.constexpr = SHAPE.ROW
    A: tl.constexpr = SHAPE.A
    R: tl.constexpr = SHAPE.R
    BT: tl.constexpr = SHAPE.BT
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    i_q, at = _sequence(tl.program_id(0), S, H, blocks)
    at_k = _key_head(at, R)
    o_t = i_q * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_q = load_frames(q, at, o_t, m_t, A, ROW)  # [1, BT, W]
    b_m = tl.full([1, BT, 1], -float("inf"), tl.float32)
    b_l = tl.zeros([1, BT, 1], tl.float32)
    b_o = zeros(1, BT, ROW)
    blocks_k = key_blocks(p_len, at.b, i_q, frames, BT, BT)
    for i in range(blocks_k.n_low + blocks_k.n_run):
        o_f = block_at(i, blocks_k) * BT + tl.arange(0, BT)
        m_s, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
        b_k = load_frames(k, at_k, o_f, m_f, A, ROW)
        b_v = load_frames(v, at_k, o_f, m_f, A, ROW)
        b_s = tl.where(seen, inner(b_q, b_k) * exponent, -float("inf"))  # [1, BT, BT]
        b_new = tl.maximum(b_m, tl.max(b_s, 2, keep_dims=True))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe)
        b_c = tl.exp2(b_m - b_safe)
        b_l = b_l * b_c + tl.sum(b_p, 2, keep_dims=True)
        b_v, v_flag = finite_rows(b_v, SHAPE.MASKED)
        if SHAPE.MASKED:
            b_p = poisoned(b_p, transposed(v_flag), seen, 0.0)
        b_o = add(scale(b_o, b_c), weighted(b_p, b_v))
        b_m = b_new
    m_row = at.m[:, None] & m_t[None, :]
    o_row = row_offsets(at, o_t, T, S, H)  # [1, BT]
    none = b_m == -float("inf")
    b_o = scale(b_o, tl.where(none, 0.0, 1 / b_l))
    if gate is not None:
        b_o = keep(gated(b_o, gate, at, o_t, o_row, m_row, m_row, ROW, SHAPE.GATE_ROWS), ~none)
    store_rows(p_o, o_row * ROW.D, m_row, b_o, ROW)
    if p_lse is not None:
        b_lse = tl.where(none, -float("inf"), b_m * LN_2 + tl.log(b_l))
        tl.store(p_lse + o_row[:, :, None], b_lse, mask=m_row[:, :, None])


@triton.jit
def _scores_backward(b_q, b_k, b_v, b_do, b_lse, b_delta, seen, sm_scale):
    """P and dS [1, BT, BT] from lse (to base 2) and delta [1, BT, 1]."""
    b_s = inner(b_q, b_k) * (sm_scale * LOG2_E)
    b_p = tl.where(seen, tl.exp2(b_s - b_lse), 0.0)
    b_ds = tl.where(seen, b_p * (inner(b_do, b_v) - b_delta) * sm_scale, 0.0)
    return b_p, b_ds


@triton.jit(do_not_specialize=[*Frames._fields, "S", "H", "blocks"])
def temporal_long_bwd_q_kernel(
    q,
    k,
    v,
    do,
    dq,
    p_o,
    p_lse,
    p_dlse,
    p_delta,
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
    """One program: the gradient of BT query frames of one sequence (position, head), and their delta.

    q, do, dq: Rows (B, T, S, H, D). k, v: Rows (B, T_k, S, H/R, D). p_o: (B, T, S, H, D), contiguous. p_lse, p_delta,
    p_dlse or None: (B, T, S, H); p_delta is filled, for the other kernel. blocks: of query frames.
    """
    ROW: tl.constexpr = SHAPE.ROW
    A: tl.constexpr = SHAPE.A
    R: tl.constexpr = SHAPE.R
    BT: tl.constexpr = SHAPE.BT
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    i_q, at = _sequence(tl.program_id(0), S, H, blocks)
    at_k = _key_head(at, R)
    o_t = i_q * BT + tl.arange(0, BT)
    m_t, m_block, seen_block = frame_pairs(p_len, at.b, frames, o_t, tl.arange(0, BT), SHAPE.MASKED)
    m_t = m_t & (o_t < T)
    m_row = at.m[:, None] & m_t[None, :]
    o_row = row_offsets(at, o_t, T, S, H)  # [1, BT]
    b_q = load_frames(q, at, o_t, m_t, A, ROW)  # [1, BT, W]
    b_do = load_frames(do, at, o_t, m_t, A, ROW)
    b_o = load_rows(p_o, o_row * ROW.D, m_row, ROW)
    b_dlse = load_dlse(p_dlse, o_row, m_row)  # [1, BT, 1]
    b_delta = row_sum(mul(to(b_do, tl.float32), to(b_o, tl.float32)), 0) - b_dlse
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0)[:, :, None] * LOG2_E
    b_dq = zeros(1, BT, ROW)
    b_sum = tl.zeros([1, BT, 1], tl.float32) - b_dlse * sm_scale
    blocks_k = key_blocks(p_len, at.b, i_q, frames, BT, BT)
    for i in range(blocks_k.n_low + blocks_k.n_run):
        o_f = block_at(i, blocks_k) * BT + tl.arange(0, BT)
        m_s, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
        b_k = load_frames(k, at_k, o_f, m_f, A, ROW)
        b_v = load_frames(v, at_k, o_f, m_f, A, ROW)
        b_p, b_ds = _scores_backward(b_q, b_k, b_v, b_do, b_lse, b_delta, seen, sm_scale)
        b_sum += tl.sum(b_ds.to(b_k[0].dtype).to(tl.float32), 2, keep_dims=True)
        b_k, _ = finite_rows(b_k, SHAPE.MASKED)  # a row that sees what is not finite has it in its lse or delta
        b_dq = add(b_dq, weighted(b_ds, b_k))
    # out was rounded, so delta errs, by the same for all keys of a row: dq would err by that times the keys' mean. But
    # a row of dS adds up to dlse: what it adds up to beside that is taken off, of delta for the other kernel, and of dq
    # over the keys of the first block that a row sees: one block for all rows, or two where windows are small.
    b_delta += tl.where(sm_scale == 0.0, 0.0, b_sum / sm_scale)
    tl.store(p_delta + o_row[:, :, None], b_delta, mask=m_row[:, :, None])
    b_left = m_t[None, :, None]
    n = blocks_k.n_low + blocks_k.n_run if SHAPE.MASKED else tl.minimum(blocks_k.n_run, 1)
    for i in range(n):
        if tl.max(b_left.to(tl.int32)) > 0:
            o_f = block_at(i, blocks_k) * BT + tl.arange(0, BT)
            m_s, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
            b_k, _ = finite_rows(load_frames(k, at_k, o_f, m_f, A, ROW), SHAPE.MASKED)
            b_n = tl.sum(seen.to(tl.float32), 2, keep_dims=True)
            seen = seen & b_left
            b_share = tl.where(seen, -b_sum / tl.maximum(b_n, 1.0), 0.0)
            b_dq = add(b_dq, weighted(b_share, b_k))
            b_left = b_left & (b_n == 0.0)
    store_frames(dq, at, o_t, T, b_dq, A, ROW)


@triton.jit(do_not_specialize=[*Frames._fields, "S", "G", "blocks"])
def temporal_long_bwd_kv_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    p_lse,
    p_delta,
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
    G,
    blocks,
    sm_scale,
    SHAPE: tl.constexpr,
):
    """One program: the gradients of BT key frames of one sequence (position, key/value head), after R query heads.

    q, do: Rows (B, T, S, G*R, D). k, v, dk, dv: Rows (B, T_k, S, G, D). p_lse, p_delta: (B, T, S, G*R). blocks: of key
    frames.
    """
    ROW: tl.constexpr = SHAPE.ROW
    A: tl.constexpr = SHAPE.A
    R: tl.constexpr = SHAPE.R
    BT: tl.constexpr = SHAPE.BT
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    i_k, at = _sequence(tl.program_id(0), S, G, blocks)
    o_f = i_k * BT + tl.arange(0, BT)
    valid, last = valid_frames(p_len, at.b, frames)
    m_f = o_f < valid
    if SHAPE.MASKED:
        m_f = m_f & is_seen(o_f, last, frames)
    b_k = load_frames(k, at, o_f, m_f, A, ROW)  # [1, BT, W]
    b_v = load_frames(v, at, o_f, m_f, A, ROW)
    b_dk = zeros(1, BT, ROW)
    b_dv = zeros(1, BT, ROW)
    blocks_q = _query_blocks(p_len, at.b, i_k, frames, BT)
    n = blocks_q.n_low + blocks_q.n_run
    for i in range(n * R):
        head = Sequences(at.b, at.s, at.h * R + i // n, at.m)
        o_t = block_at(i % n, blocks_q) * BT + tl.arange(0, BT)
        m_t, m_s, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, SHAPE.MASKED)
        m_t = m_t & (o_t < T)
        m_row = at.m[:, None] & m_t[None, :]
        o_row = row_offsets(head, o_t, T, S, G * R)
        b_q = load_frames(q, head, o_t, m_t, A, ROW)
        b_do = load_frames(do, head, o_t, m_t, A, ROW)
        b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0)[:, :, None] * LOG2_E
        b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)[:, :, None]
        b_p, b_ds = _scores_backward(b_q, b_k, b_v, b_do, b_lse, b_delta, seen, sm_scale)
        b_do, do_flag = finite_rows(b_do, SHAPE.MASKED)
        b_q, _ = finite_rows(b_q, SHAPE.MASKED)
        if SHAPE.MASKED:
            b_p = poisoned(b_p, do_flag, seen, 0.0)
        b_dv = add(b_dv, weighted(transposed(b_p), b_do))
        b_dk = add(b_dk, weighted(transposed(b_ds), b_q))
    store_frames(dk, at, o_f, T_k, b_dk, A, ROW)
    store_frames(dv, at, o_f, T_k, b_dv, A, ROW)


def _long_arguments(
    table: tuple[LongConfig, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Tensor, ...] = (),
    *,
    gate: Gate | None = None,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
) -> tuple[LongConfig, dict[str, Any]]:
    """The config, and what all three kernels take by the same names; ``others``: tensors with the same steps."""
    T_k, G = k.shape[1], k.shape[3]
    frames, masked = frame_bounds(mask, q.shape[1], T_k, q_start, q.device)
    row = _row(q.shape[4], masked)
    config = pick(table, arch_of(q), lambda c: c.channels >= _cost(row, masked))
    A = step(q, k, v, *others)
    shape = LongShape(row, A, q.shape[3] // G, config.block, masked, gate is not None and gate.d != 0)
    sides = {"q": rows(q, A), "k": rows(k, A), "v": rows(v, A)}
    return config, {
        "like": q,
        "config": config,
        **sides,
        "p_len": lengths,
        **frames._asdict(),
        "S": q.shape[2],
        "SHAPE": shape,
    }


def temporal_long_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    sm_scale: float,
    gate: Gate | None,
    **frames: Any,
) -> None:
    """As temporal_forward, of q and k that are normalized and rotated; ``frames``: its mask, q_start and lengths."""
    B, T, S, H, _ = q.shape
    config, shared = _long_arguments(FORWARD, q, k, v, gate=gate, **frames)
    blocks = cdiv(T, config.block)
    launch(
        temporal_long_fwd_kernel,
        B * S * H * blocks,
        gate=gate,
        p_o=out,
        p_lse=lse,
        H=H,
        blocks=blocks,
        exponent=sm_scale * LOG2_E.value,
        **shared,
    )


def temporal_long_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    *,
    sm_scale: float,
    **frames: Any,
) -> None:
    """Fills the gradients of normalized and rotated q and k, and of v; ``frames`` as forward's."""
    B, T, S, H, _ = q.shape
    T_k, G = k.shape[1], k.shape[3]
    config, shared = _long_arguments(BACKWARD, q, k, v, (dout, *gradients), **frames)
    A = shared["SHAPE"].A
    dq, dk, dv = (rows(x, A) for x in gradients)
    delta = torch.empty(B, T, S, H, dtype=torch.float32, device=q.device)
    shared |= {"do": rows(dout, A), "p_lse": lse, "p_delta": delta, "sm_scale": sm_scale}
    blocks = cdiv(T, config.block)
    launch(temporal_long_bwd_q_kernel, B * S * H * blocks, dq=dq, p_o=out, p_dlse=dlse, H=H, blocks=blocks, **shared)
    blocks = cdiv(T_k, config.block)
    launch(temporal_long_bwd_kv_kernel, B * S * G * blocks, dk=dk, dv=dv, G=G, blocks=blocks, **shared)
