"""Norm and rotary embedding of queries or keys, backward: gradients of rows, weights and tables, and who takes part.

Bound by memory, as forward. Sums are taken per program and then in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import Frames, frame_bounds, is_seen, load_length, valid_frames, visible_runs
from vdcore_kernels.core.launch import Config, ValuesConfig, cdiv, launch
from vdcore_kernels.core.tile import (
    add,
    affine,
    by_weight,
    center,
    column_sum,
    filled,
    load_affine,
    load_rows,
    mul,
    neighbors,
    norm_arguments,
    rope_arguments,
    rotate,
    rows,
    scale,
    standardize,
    standardize_backward,
    to,
)
from vdcore_kernels.qk_norm_rope.forward import (
    blocks_of,
    is_over_all,
    load_block,
    load_block_affine,
    row_angles,
    row_arguments,
    row_block,
    row_stats,
    store_block,
    zero_block,
)


class Live(NamedTuple):
    """Which tokens take part: a table ``(B, T, S)`` and its strides, 0 where it does not vary."""

    p: Any
    b: Any
    t: Any
    s: Any


def _live(x: Tensor | None) -> Live | None:
    return None if x is None else Live(x, x.stride(0), x.stride(1), x.stride(2) if x.ndim > 2 else 0)


@dataclass(frozen=True)
class SumConfig(ValuesConfig):
    """programs: of sums, each with a part that is then added up: of one head, 7 to 10 waves of a large GPU, or of all
    heads of a token, a part as large as it is.
    """

    programs: int = 8192


_SUMS = "rows, gradients and sums of 32 values a thread: a quarter less to issue than over twice the warps"
BACKWARD_ROWS = (
    SumConfig("interpreter", 4, 1, "so few rows that a small case takes several programs", 1024, 16),
    SumConfig("", 2, 1, _SUMS, 2048, registers=255),
)
BACKWARD_TOKENS = (
    SumConfig("interpreter", 4, 1, "a small case takes several programs", 8192, 16),
    SumConfig("", 2, 1, "32 values a thread at most", 2048, 2048, registers=255),
    SumConfig("sm_8|sm_9|sm_10|gfx", 4, 1, "40 values a thread at most; elsewhere a layer norm spills", 5120, 2048),
    SumConfig("", 8, 1, "32 values a thread at most", 8192, 2048),
)


@triton.jit
def _alive(live, m, i_b, i_t, i_s):
    """Of tokens those that take part."""
    if live is not None:
        p = tl.broadcast_to(live.p + (i_b * live.b + i_t * live.t + i_s * live.s), m.shape)
        m = m & (tl.load(p, mask=m, other=0) > 0)
    return m


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start", "blocks"])
def norm_rope_bwd_kernel(
    x, dy, p_dx, s_dx, p_dw, p_db, live, norm, angles, T, S, H, frame_start, blocks, TILE: tl.constexpr
):
    """One program: every n-th, of n programs, of the blocks of BN rows (token, head), with ALL of one token's.

    x, dy: Rows (B, T, S, H, D). p_dx: as x, with token stride s_dx; heads follow one another. p_dw, p_db: partial sums
    (programs, D), with ALL (programs, H*D), float32; or None. live: Live, or None: all tokens take part. frame_start:
    the table's row of frame 0.
    """
    ROW: tl.constexpr = TILE.ROW
    BN: tl.constexpr = TILE.BN
    NR: tl.constexpr = TILE.NR
    ALL: tl.constexpr = NR.ALL
    o_w = tl.arange(0, BN).to(tl.int64)
    b_w, _ = load_block_affine(norm, o_w, o_w < H, TILE)
    b_dw = zero_block(TILE)
    b_db = b_dw
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i_b, i_t, o_n, o_s, o_h, m_n = row_block(i, T, S, H, BN, ALL)
        m_x = _alive(live, m_n, i_b, i_t, o_s)
        b_g = load_block(dy, i_b, i_t, o_s, o_h, m_x, TILE)
        b_x = b_g
        if NR.KIND > 0:  # beside dy: a barrier in between is a second trip to memory
            b_x = load_block(x, i_b, i_t, o_s, o_h, m_x, TILE)
        b_cos, b_sin = row_angles(angles, i_t + frame_start, o_s, o_h, m_n, -1.0, ROW, NR)
        b_g = to(b_g, tl.float32)
        if NR.STYLE > 0:
            b_g = rotate(b_g, b_cos, b_sin, NR.STYLE)
        if NR.KIND > 0:
            count = H * ROW.D if ALL else ROW.D
            b_h, rstd = standardize(to(b_x, tl.float32), m_x, count, norm.eps, ROW, NR.KIND, ALL)
            if p_dw is not None:
                b_dw = add(b_dw, mul(b_g, b_h))
            if p_db is not None:
                b_db = add(b_db, b_g)
            b_g = by_weight(b_g, norm, b_w)
            b_g = standardize_backward(b_g, b_h, rstd, m_x, count, ROW, NR.KIND, ALL)
        o_dx = ((i_b * T + i_t) * S + o_s) * s_dx + o_h * ROW.D
        store_block(p_dx, o_dx, m_n, b_g, TILE)
    i_part = tl.program_id(0).to(tl.int64) * ROW.D
    if ALL:
        o_part, m_part = i_part * H + o_w * ROW.D, o_w < H
    else:
        o_part, m_part = i_part + tl.arange(0, 1), tl.full([1], 1, tl.int1)
        b_dw, b_db = column_sum(b_dw), column_sum(b_db)
    if p_dw is not None:
        store_block(p_dw, o_part, m_part, b_dw, TILE)
    if p_db is not None:
        store_block(p_db, o_part, m_part, b_db, TILE)


@triton.jit
def _angle_gradients(x, g, STYLE: tl.constexpr):
    """Gradients of cos and of sin from rows and the gradients of the rotated rows, [BN, W/2].

    (a cos - b sin, b cos + a sin) with gradients (da, db): d cos = a da + b db, d sin = a db - b da.
    """
    if STYLE == 2:
        return (x[0] * g[0] + x[1] * g[1],), (x[0] * g[1] - x[1] * g[0],)
    elif len(x) > 1:
        a0, b0 = neighbors(x[0])
        a1, b1 = neighbors(x[1])
        da0, db0 = neighbors(g[0])
        da1, db1 = neighbors(g[1])
        return (a0 * da0 + b0 * db0, a1 * da1 + b1 * db1), (a0 * db0 - b0 * da0, a1 * db1 - b1 * da1)
    else:
        a, b = neighbors(x[0])
        da, db = neighbors(g[0])
        return (a * da + b * db,), (a * db - b * da,)


@triton.jit
def _store_angles(p, x, ROW: tl.constexpr, NR: tl.constexpr):
    W: tl.constexpr = ROW.W0 if NR.STYLE == 2 else ROW.W0 // 2
    r = tl.arange(0, W)
    tl.store(p + r, tl.sum(x[0], 0), mask=r < NR.R2)
    if len(x) > 1:
        r1 = ROW.C0 // 2 + tl.arange(0, ROW.W1 // 2)
        tl.store(p + r1, tl.sum(x[1], 0), mask=r1 < NR.R2)


@triton.jit(do_not_specialize=["T", "S", "H", "CT", "CS", "CH", "summed", "chunks"])
def rope_table_bwd_kernel(x, dy, p_out, live, norm, T, S, H, CT, CS, CH, summed, chunks, TILE: tl.constexpr):
    """One program: a chunk of the rows that share a cell (frame, token, head) of the table.

    x, dy: Rows (B, T, S, H, D). p_out: partial sums (chunks, 2, cells, R/2), float32: of cos and of sin. norm: with its
    statistics where it is over all heads. live: Live, or None: all tokens take part. CT, CS, CH: frames, tokens and
    heads that the table tells apart: T, S, H or 1. summed: rows that share a cell.
    """
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    BN: tl.constexpr = TILE.BN
    NR: tl.constexpr = TILE.NR
    i_cell = tl.program_id(0) // chunks
    i_chunk = tl.program_id(0) % chunks
    NT, NS, NH = T // CT, S // CS, H // CH  # how many share
    zero = filled(BN, 0.0, ROW)
    b_dcos, b_dsin = _angle_gradients(zero, zero, NR.STYLE)
    for i in range(i_chunk * BN, summed, chunks * BN):
        o_j = i + tl.arange(0, BN)
        m_j = o_j < summed
        o_h = (i_cell % CH + o_j % NH).to(tl.int64)
        o_s = (i_cell // CH % CS + o_j // NH % NS).to(tl.int64)
        o_t = (i_cell // CH // CS + o_j // NH // NS % NT).to(tl.int64)
        o_b = (o_j // NH // NS // NT).to(tl.int64)
        m_j = _alive(live, m_j, o_b, o_t, o_s)
        b_x = load_rows(x.p, (o_b * x.b + o_t * x.t + o_s * x.s + o_h * x.h) * A, m_j, ROW)  # [BN, W]
        b_g = load_rows(dy.p, (o_b * dy.b + o_t * dy.t + o_s * dy.s + o_h * dy.h) * A, m_j, ROW)
        b_x, b_g = to(b_x, tl.float32), to(b_g, tl.float32)
        if NR.KIND > 0:
            if NR.ALL:
                o_r = ((o_b * T + o_t) * S + o_s) * 2
                mean = tl.load(norm.stats + o_r, mask=m_j, other=0.0)[:, None]
                rstd = tl.load(norm.stats + o_r + 1, mask=m_j, other=0.0)[:, None]
                b_x = scale(center(b_x, mean, m_j, ROW), rstd)
            else:
                b_x, _ = standardize(b_x, m_j, ROW.D, norm.eps, ROW, NR.KIND, 0)
            b_w, b_b = load_affine(norm, o_h * ROW.D, m_j, ROW, NR.ALL)
            b_x = affine(b_x, norm, b_w, b_b)
        dcos, dsin = _angle_gradients(b_x, b_g, NR.STYLE)
        b_dcos, b_dsin = add(b_dcos, dcos), add(b_dsin, dsin)
    cells = CT * CS * CH
    p_cos = p_out + (i_chunk.to(tl.int64) * 2 * cells + i_cell) * NR.R2
    _store_angles(p_cos, b_dcos, ROW, NR)
    _store_angles(p_cos + cells.to(tl.int64) * NR.R2, b_dsin, ROW, NR)


def norm_rope_backward(
    x: Tensor,
    dy: Tensor,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    frame_start: int,
    wanted: frozenset[str],
    *,
    dx: Tensor | None = None,
    live: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients ``"x"`` and, of the wanted ones, ``"weight"``, ``"bias"``, ``"cos"``, ``"sin"``; sums in float32.

    Args:
        x, dy: ``(B, T, S, heads, D)``.
        dx: where the gradient of x goes: its heads contiguous, its tokens evenly spaced; None: a new tensor.
        live: ``(B, T)`` or ``(B, T, S)``: what takes part; the rest gets 0, whatever x and dy hold there.
    """
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    found = {"x": dx}
    weights = norm_arguments(norm, role)
    learned = {name: w for name, w in (("weight", weights.w), ("bias", weights.b)) if name in wanted and w is not None}
    if rope is not None and wanted & {"cos", "sin"}:
        learned |= {"cos": rope.cos, "sin": rope.sin}
    found |= {name: torch.zeros(w.shape, dtype=torch.float32, device=x.device) for name, w in learned.items()}
    if not x.numel():
        return found

    over_all = is_over_all(norm)
    table = BACKWARD_TOKENS if over_all else BACKWARD_ROWS
    config, tile, shared = row_arguments(table, x, norm, rope, over_all=over_all, also=dy)
    blocks = blocks_of(x, tile.BN, over_all)
    programs = min(blocks, config.programs)
    partial = {
        name: torch.empty(programs, found[name].numel(), dtype=torch.float32, device=x.device)
        for name in ("weight", "bias")
        if name in found
    }
    launch(
        norm_rope_bwd_kernel,
        programs,
        dy=rows(dy, tile.A),
        p_dx=dx,
        s_dx=dx.stride(2),
        p_dw=partial.get("weight"),
        p_db=partial.get("bias"),
        live=_live(live),
        norm=weights,
        angles=rope_arguments(rope),
        frame_start=frame_start,
        blocks=blocks,
        **shared,
    )
    for name, sums in partial.items():
        found[name] = sums.sum(0)
    if rope is not None and "cos" in found:
        _table_gradients(x, dy, norm, role, rope, frame_start, live, found)
    return found


def _table_gradients(
    x: Tensor,
    dy: Tensor,
    norm: QKNorm | None,
    role: str,
    rope: Rope,
    frame_start: int,
    live: Tensor | None,
    found: dict[str, Tensor],
) -> None:
    """Fills the gradients of the tables: one more pass over x and dy, since a table learns in few models."""
    B, T, S, H, _ = x.shape
    shape = rope.cos.shape if rope.cos.ndim == 4 else (*rope.cos.shape[:2], 1, rope.cos.shape[2])
    cells = (T if shape[0] > 1 else 1, shape[1], shape[2])
    count = cells[0] * cells[1] * cells[2]
    summed = B * T * S * H // count
    config, tile, shared = row_arguments(BACKWARD_ROWS, x, norm, rope, over_all=False, also=dy)
    chunks = max(min(cdiv(config.programs // 8, count), cdiv(summed, tile.BN)), 1)
    partial = torch.empty(chunks, 2, *cells, shape[3], dtype=torch.float32, device=x.device)
    launch(
        rope_table_bwd_kernel,
        count * chunks,
        dy=rows(dy, tile.A),
        p_out=partial,
        live=_live(live),
        norm=norm_arguments(norm, role, row_stats(x, norm)),
        CT=cells[0],
        CS=cells[1],
        CH=cells[2],
        summed=summed,
        chunks=chunks,
        **shared,
    )
    total = partial.sum(0)
    first = frame_start if shape[0] > 1 else 0
    for name, part in zip(("cos", "sin"), total):
        found[name].view(shape)[first : first + cells[0]] = part


@triton.jit(do_not_specialize=[*Frames._fields, "L"])
def live_frames_kernel(
    p_q,
    p_k,
    p_len,
    p_text,
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
    L,  # text tokens; 0: no text
    TEXT_SEES: tl.constexpr,  # text sees the video
    BT: tl.constexpr,  # frames at a time
):
    """One program: one sample. p_q: (B, T), int8: query frames that see anything; p_k: (B, T_k), int8: key frames that
    any query sees. p_len: (B,), or None. p_text: (B,), valid text tokens; None: all L.
    """
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    i_b = tl.program_id(0).to(tl.int64)
    valid, last = valid_frames(p_len, i_b, frames)
    text = L + 0
    if p_text is not None:
        text = load_length(p_text, i_b, L)
    for i in range(0, T, BT):
        o = i + tl.arange(0, BT)
        low, low_end, begin, end = visible_runs(q_start + o, valid, frames)
        live = (q_start + o < last) & ((low < low_end) | (begin < end) | (text > 0))
        tl.store(p_q + i_b * T + o, tl.where(live, 1, 0), mask=o < T)
    of_text = 0
    if TEXT_SEES:
        of_text = T_k
        if p_len is not None:
            of_text = load_length(p_len, i_b, T_k)
        of_text = tl.where(text > 0, of_text, 0)
    for i in range(0, T_k, BT):
        o = i + tl.arange(0, BT)
        live = ((o < valid) & is_seen(o, last, frames)) | (o < of_text)
        tl.store(p_k + i_b * T_k + o, tl.where(live, 1, 0), mask=o < T_k)


LIVE = Config("", 4, 1, "a few numbers per sample: the launch is all it costs")


def live_frames(
    q: Tensor,
    k: Tensor,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    text: int = 0,
    text_lengths: Tensor | None = None,
    text_sees: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Frames of q ``(B, T, ...)`` and of k ``(B, T_k, ...)`` that take part, ``(B, T)``; None where all do.

    Args:
        text: text tokens that the video sees, of which ``text_lengths`` ``(B,)`` are valid.
        text_sees: they see the video.
    """
    B, T, T_k = q.shape[0], q.shape[1], k.shape[1]
    frames, masked = frame_bounds(mask, T, T_k, q_start, q.device)
    if not masked and lengths is None:
        return None, None
    of_q, of_k = (torch.empty(B, n, dtype=torch.int8, device=q.device) for n in (T, T_k))
    launch(
        live_frames_kernel,
        B,
        like=q,
        config=LIVE,
        p_q=of_q,
        p_k=of_k,
        p_len=lengths,
        p_text=text_lengths,
        **frames._asdict(),
        L=text,
        TEXT_SEES=text_sees,
        BT=128,
    )
    return of_q, of_k
