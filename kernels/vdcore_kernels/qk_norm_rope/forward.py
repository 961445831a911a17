"""Norm and rotary embedding of queries or keys, forward and backward.

Bound by memory: a row is read once, normed and turned in registers, and written once. Attention kernels that are bound
by arithmetic norm and rotate through these, and so does every backward that has to sum over heads or positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import (
    KINDS,
    Row,
    add,
    affine,
    by_weight,
    center,
    column_sum,
    filled,
    load_angles,
    load_rows,
    mul,
    neighbours,
    norm_arguments,
    rope_arguments,
    rotate,
    row_sum,
    rows,
    scale,
    split_row,
    standardize,
    standardize_backward,
    store_rows,
    to,
)


class Live(NamedTuple):
    """Which tokens take part: a table ``(B, T, S)`` and its strides, 0 where it does not vary."""

    p: Any
    b: Any
    t: Any
    s: Any


def _live(x: Tensor | None) -> Live | None:
    return None if x is None else Live(x, *x.stride()[:2], x.stride(2) if x.ndim > 2 else 0)


@dataclass(frozen=True)
class LineConfig(Config):
    """values: channels times heads that a program holds; programs: of sums, each with a part that is then added up."""

    values: int = 4096
    programs: int = 1024


_LINES = "predicted: 32 values a thread are 4 loads of 16 bytes in flight, and heads of one token share its angles"
_TOKEN = "a norm over all heads holds a token's heads at once"
LINES = (
    LineConfig("interpreter", 4, 1, "so few lines that a small case takes several programs", 1024, 8),
    LineConfig("", 4, 1, _LINES, 4096),
    LineConfig("", 8, 1, _TOKEN, 8192),
)
_SUMS = "predicted: rows, gradients and two sums of 16 values a thread each stay under 128 registers"
BACKWARD_LINES = (
    LineConfig("interpreter", 4, 1, "so few lines that a small case takes several programs", 1024, 8),
    LineConfig("", 4, 1, _SUMS, 2048),
    LineConfig("", 8, 1, _TOKEN, 4096),
    LineConfig("", 16, 1, _TOKEN, 8192),
)
MAX_TOKEN = 8192  # heads times channels, each as wide as its tile, of a norm over all heads


@triton.jit
def frame_lines(i, T, S, H, BN: tl.constexpr, ALL: tl.constexpr):
    """Of the i-th of all frames' blocks: sample, frame, and its lines (token, head), [BN].

    With ALL a block is one token, else any BN lines of a frame.
    """
    count = H if ALL else BN
    blocks = tl.cdiv(S * H, count)
    i_bt = (i // blocks).to(tl.int64)
    o_n = (i % blocks) * count + tl.arange(0, BN)
    m_n = (o_n < S * H) & (tl.arange(0, BN) < count)
    return i_bt // T, i_bt % T, o_n, m_n


@triton.jit
def line_angles(angles, i_f, o_s, o_h, m_n, SIGN, ROW: tl.constexpr, STYLE: tl.constexpr, R2: tl.constexpr):
    """Cosines and SIGN times sines of lines (token, head) of frame i_f, [BN, W/2]."""
    b_cos = load_angles(angles.cos, i_f * angles.cf + o_s * angles.cs + o_h * angles.ch, m_n, 1.0, ROW, STYLE, R2)
    b_sin = load_angles(angles.sin, i_f * angles.sf + o_s * angles.ss + o_h * angles.sh, m_n, 0.0, ROW, STYLE, R2)
    return b_cos, scale(b_sin, SIGN)


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start"])
def norm_rope_fwd_kernel(
    x,  # Rows (B, T, S, H, D)
    p_y,  # (B, T, S, H, D), contiguous
    norm,
    angles,
    T,
    S,
    H,
    frame_start,
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,  # lines
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    i_b, i_t, o_n, m_n = frame_lines(tl.program_id(0), T, S, H, BN, ALL)
    o_s = (o_n // H).to(tl.int64)
    o_h = (o_n % H).to(tl.int64)
    b_x = load_rows(x.p + (i_b * x.b + i_t * x.t) * A, (o_s * x.s + o_h * x.h) * A, m_n, ROW)  # [BN, W]
    b_y = to(b_x, tl.float32)
    if KIND > 0:
        b_y, _ = standardize(b_y, m_n, H * ROW.D if ALL else ROW.D, norm.eps, ROW, KIND, ALL)
        b_y = affine(b_y, norm, o_h * ROW.D, m_n, ROW, ALL)
    if STYLE > 0:
        b_cos, b_sin = line_angles(angles, i_t + frame_start, o_s, o_h, m_n, 1.0, ROW, STYLE, R2)
        b_y = rotate(b_y, b_cos, b_sin, STYLE)
    store_rows(p_y, ((i_b * T + i_t) * S * H + o_n) * ROW.D, m_n, b_y, ROW)


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start", "blocks"])
def norm_rope_bwd_kernel(
    x,  # Rows (B, T, S, H, D)
    dy,
    p_dx,  # (B, T, S, H, D): token stride s_dx, heads follow one another
    s_dx,
    p_dw,  # partial sums (programs, D), with ALL (programs, H*D), float32; or None
    p_db,
    live,  # Live: tokens that take part, or None: all
    norm,
    angles,
    T,
    S,
    H,
    frame_start,
    blocks,
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    # Where the weights of the block's lines are: with ALL of every head, else of one for all.
    NW: tl.constexpr = BN if ALL else 1
    o_w = tl.arange(0, NW).to(tl.int64) * ROW.D
    m_w = tl.arange(0, NW) < (H if ALL else 1)
    b_dw = filled(BN, 0.0, ROW)
    b_db = b_dw
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i_b, i_t, o_n, m_n = frame_lines(i, T, S, H, BN, ALL)
        m_x = m_n
        o_s = (o_n // H).to(tl.int64)
        if live is not None:
            m_x = m_n & (tl.load(live.p + i_b * live.b + i_t * live.t + o_s * live.s, mask=m_n, other=0) > 0)
        o_h = (o_n % H).to(tl.int64)
        b_g = load_rows(dy.p + (i_b * dy.b + i_t * dy.t) * A, (o_s * dy.s + o_h * dy.h) * A, m_x, ROW)  # [BN, W]
        b_g = to(b_g, tl.float32)
        if STYLE > 0:
            b_cos, b_sin = line_angles(angles, i_t + frame_start, o_s, o_h, m_n, -1.0, ROW, STYLE, R2)
            b_g = rotate(b_g, b_cos, b_sin, STYLE)
        if KIND > 0:
            b_x = load_rows(x.p + (i_b * x.b + i_t * x.t) * A, (o_s * x.s + o_h * x.h) * A, m_x, ROW)
            count = H * ROW.D if ALL else ROW.D
            b_h, rstd = standardize(to(b_x, tl.float32), m_x, count, norm.eps, ROW, KIND, ALL)
            if p_dw is not None:
                b_dw = add(b_dw, mul(b_g, b_h))
            if p_db is not None:
                b_db = add(b_db, b_g)
            b_g = standardize_backward(
                by_weight(b_g, norm, o_h * ROW.D, m_n, ROW, ALL), b_h, rstd, m_x, count, ROW, KIND, ALL
            )
        o_dx = ((i_b * T + i_t) * S + o_s) * s_dx + o_h * ROW.D
        store_rows(p_dx, o_dx, m_n, b_g, ROW)
    o_p = tl.program_id(0).to(tl.int64) * (H * ROW.D if ALL else ROW.D) + o_w
    if not ALL:
        b_dw, b_db = column_sum(b_dw), column_sum(b_db)
    if p_dw is not None:
        store_rows(p_dw, o_p, m_w, b_dw, ROW)
    if p_db is not None:
        store_rows(p_db, o_p, m_w, b_db, ROW)


@triton.jit(do_not_specialize=["T", "S", "H"])
def row_stats_kernel(
    x,  # Rows (B, T, S, H, D)
    p_stats,  # (B, T, S, 2): mean (0 with KIND 1) and 1 / deviation, over all heads
    eps,
    T,
    S,
    H,
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
):
    i_b, i_t, o_n, m_n = frame_lines(tl.program_id(0), T, S, H, BN, 1)
    o_x = ((o_n // H).to(tl.int64) * x.s + (o_n % H).to(tl.int64) * x.h) * A
    b_x = to(load_rows(x.p + (i_b * x.b + i_t * x.t) * A, o_x, m_n, ROW), tl.float32)
    mean = tl.zeros([1, 1], tl.float32)
    if KIND == 2:
        mean = row_sum(b_x, 1) / (H * ROW.D)
    _, rstd = standardize(b_x, m_n, H * ROW.D, eps, ROW, KIND, 1)
    p_row = p_stats + tl.program_id(0).to(tl.int64) * 2 + tl.zeros([1, 1], tl.int32)
    tl.store(p_row, mean)
    tl.store(p_row + 1, rstd)


@triton.jit
def _turned(x, g, STYLE: tl.constexpr):
    """Gradients of cos and of sin from rows and the gradients of the turned rows, [BN, W/2].

    (a cos - b sin, b cos + a sin) with gradients (da, db): d cos = a da + b db, d sin = a db - b da.
    """
    if STYLE == 2:
        return (x[0] * g[0] + x[1] * g[1],), (x[0] * g[1] - x[1] * g[0],)
    elif len(x) > 1:
        a0, b0 = neighbours(x[0])
        a1, b1 = neighbours(x[1])
        da0, db0 = neighbours(g[0])
        da1, db1 = neighbours(g[1])
        return (a0 * da0 + b0 * db0, a1 * da1 + b1 * db1), (a0 * db0 - b0 * da0, a1 * db1 - b1 * da1)
    else:
        a, b = neighbours(x[0])
        da, db = neighbours(g[0])
        return (a * da + b * db,), (a * db - b * da,)


@triton.jit
def _store_angles(p, x, ROW: tl.constexpr, STYLE: tl.constexpr, R2: tl.constexpr):
    W: tl.constexpr = ROW.W0 if STYLE == 2 else ROW.W0 // 2
    r = tl.arange(0, W)
    tl.store(p + r, tl.sum(x[0], 0), mask=r < R2)
    if len(x) > 1:
        r1 = ROW.C0 // 2 + tl.arange(0, ROW.W1 // 2)
        tl.store(p + r1, tl.sum(x[1], 0), mask=r1 < R2)


@triton.jit(do_not_specialize=["T", "S", "H", "CT", "CS", "CH", "summed", "chunks"])
def rope_table_bwd_kernel(
    x,  # Rows (B, T, S, H, D)
    dy,
    p_out,  # partial sums (chunks, 2, cells, R/2), float32: of cos and of sin
    p_stats,  # (B, T, S, 2) with ALL
    live,
    norm,
    T,
    S,
    H,
    CT,  # frames, tokens and heads that the table tells apart: T, S, H or 1
    CS,
    CH,
    summed,  # lines that share a cell
    chunks,
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    i_cell = tl.program_id(0) // chunks
    i_chunk = tl.program_id(0) % chunks
    NT, NS, NH = T // CT, S // CS, H // CH  # how many share
    zero = filled(BN, 0.0, ROW)
    b_dcos, b_dsin = _turned(zero, zero, STYLE)
    for i in range(i_chunk * BN, summed, chunks * BN):
        o_j = i + tl.arange(0, BN)
        m_j = o_j < summed
        o_h = (i_cell % CH + o_j % NH).to(tl.int64)
        o_s = (i_cell // CH % CS + o_j // NH % NS).to(tl.int64)
        o_t = (i_cell // CH // CS + o_j // NH // NS % NT).to(tl.int64)
        o_b = (o_j // NH // NS // NT).to(tl.int64)
        if live is not None:
            m_j = m_j & (tl.load(live.p + o_b * live.b + o_t * live.t + o_s * live.s, mask=m_j, other=0) > 0)
        b_x = load_rows(x.p, (o_b * x.b + o_t * x.t + o_s * x.s + o_h * x.h) * A, m_j, ROW)  # [BN, W]
        b_g = load_rows(dy.p, (o_b * dy.b + o_t * dy.t + o_s * dy.s + o_h * dy.h) * A, m_j, ROW)
        b_x, b_g = to(b_x, tl.float32), to(b_g, tl.float32)
        if KIND > 0:
            if ALL:
                o_r = ((o_b * T + o_t) * S + o_s) * 2
                mean = tl.load(p_stats + o_r, mask=m_j, other=0.0)[:, None]
                rstd = tl.load(p_stats + o_r + 1, mask=m_j, other=0.0)[:, None]
                b_x = scale(center(b_x, mean, m_j, ROW), rstd)
            else:
                b_x, _ = standardize(b_x, m_j, ROW.D, norm.eps, ROW, KIND, 0)
            b_x = affine(b_x, norm, o_h * ROW.D, m_j, ROW, ALL)
        dcos, dsin = _turned(b_x, b_g, STYLE)
        b_dcos, b_dsin = add(b_dcos, dcos), add(b_dsin, dsin)
    cells = CT * CS * CH
    p_cos = p_out + (i_chunk.to(tl.int64) * 2 * cells + i_cell) * R2
    _store_angles(p_cos, b_dcos, ROW, STYLE, R2)
    _store_angles(p_cos + cells.to(tl.int64) * R2, b_dsin, ROW, STYLE, R2)


def _lines(table: tuple[LineConfig, ...], x: Tensor, row: Row, all_heads: int) -> tuple[LineConfig, int]:
    """Config and lines a program: one token's heads with a norm over all of them."""
    H = x.shape[3]
    need = row.width * power_of_2(H) if all_heads else row.width
    config = pick(table, arch_of(x), lambda c: c.values >= need)
    if all_heads:
        return config, power_of_2(H)
    return config, min(max(power_of_2(config.values // row.width + 1) // 2, 1), power_of_2(x.shape[2] * H))


def fits(heads: int, D: int, norm: QKNorm | None) -> bool:
    """A norm over all heads holds a token in registers; other calls always fit."""
    return norm is None or norm.over != "all" or power_of_2(heads) * power_of_2(D) <= MAX_TOKEN


def norm_rope_forward(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None, frame_start: int = 0) -> Tensor:
    """x ``(B, T, S, heads, D)`` -> the same, contiguous; ``role``: which of the norm's weights, ``"q"`` or ``"k"``."""
    B, T, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    row = split_row(D, rope)
    weights, norm_constants = norm_arguments(norm, role)
    angles, rope_constants = rope_arguments(rope)
    config, BN = _lines(LINES, x, row, norm_constants["ALL"])
    A = step(x)
    launch(
        norm_rope_fwd_kernel,
        B * T * cdiv(S * H, H if norm_constants["ALL"] else BN),
        x,
        config,
        *(rows(x, A), y, weights, angles, T, S, H, frame_start),
        ROW=row,
        A=A,
        BN=BN,
        **norm_constants,
        **rope_constants,
    )
    return y


def row_stats(x: Tensor, norm: QKNorm) -> Tensor:
    """Mean and 1 / deviation of every token of x ``(B, T, S, heads, D)`` over all its heads: ``(B, T, S, 2)``."""
    B, T, S, H, D = x.shape
    stats = torch.empty(B, T, S, 2, dtype=torch.float32, device=x.device)
    row = split_row(D)
    config, BN = _lines(LINES, x, row, 1)
    A = step(x)
    launch(
        row_stats_kernel,
        B * T * S,
        x,
        config,
        *(rows(x, A), stats, norm.eps, T, S, H),
        ROW=row,
        A=A,
        BN=BN,
        KIND=KINDS[norm.kind],
    )
    return stats


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
    B, T, S, H, D = x.shape
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    found = {"x": dx}
    weights, norm_constants = norm_arguments(norm, role)
    for name, w in (("weight", weights.w), ("bias", weights.b)):
        if name in wanted and w is not None:
            found[name] = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
    if rope is not None and wanted & {"cos", "sin"}:
        for name in ("cos", "sin"):
            found[name] = torch.zeros(rope.cos.shape, dtype=torch.float32, device=x.device)
    if not x.numel():
        return found

    row = split_row(D, rope)
    angles, rope_constants = rope_arguments(rope)
    config, BN = _lines(BACKWARD_LINES, x, row, norm_constants["ALL"])
    A = step(x, dy)
    blocks = B * T * cdiv(S * H, H if norm_constants["ALL"] else BN)
    programs = min(blocks, 2 * config.programs)
    partial = {
        name: torch.empty(programs, found[name].numel(), dtype=torch.float32, device=x.device)
        for name in ("weight", "bias")
        if name in found
    }
    launch(
        norm_rope_bwd_kernel,
        programs,
        x,
        config,
        *(rows(x, A), rows(dy, A), dx, dx.stride(2), partial.get("weight"), partial.get("bias"), _live(live)),
        *(weights, angles, T, S, H, frame_start, blocks),
        ROW=row,
        A=A,
        BN=BN,
        **norm_constants,
        **rope_constants,
    )
    for name, sums in partial.items():
        found[name] = sums.sum(0)
    if "cos" in found:
        assert rope is not None
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
    B, T, S, H, D = x.shape
    row = split_row(D, rope)
    weights, norm_constants = norm_arguments(norm, role)
    _, rope_constants = rope_arguments(rope)
    stats = row_stats(x, norm) if norm is not None and norm.over == "all" else None
    shape = rope.cos.shape if rope.cos.ndim == 4 else (*rope.cos.shape[:2], 1, rope.cos.shape[2])
    cells = (T if shape[0] > 1 else 1, shape[1], shape[2])
    count = cells[0] * cells[1] * cells[2]
    summed = B * T * S * H // count
    config, BN = _lines(BACKWARD_LINES, x, row, 0)
    chunks = max(min(cdiv(config.programs, count), cdiv(summed, BN)), 1)
    partial = torch.empty(chunks, 2, *cells, shape[3], dtype=torch.float32, device=x.device)
    A = step(x, dy)
    launch(
        rope_table_bwd_kernel,
        count * chunks,
        x,
        config,
        *(rows(x, A), rows(dy, A), partial, stats, _live(live), weights, T, S, H, *cells, summed, chunks),
        ROW=row,
        A=A,
        BN=BN,
        **norm_constants,
        **rope_constants,
    )
    total = partial.sum(0)
    first = frame_start if shape[0] > 1 else 0
    for name, part in zip(("cos", "sin"), total):
        found[name].view(shape)[first : first + cells[0]] = part
