"""Norm and rotary embedding of queries or keys, forward and backward.

Bound by memory: a row is read once, normed and turned in registers, and written once. Attention kernels that are bound
by arithmetic norm and rotate through these, and so does every backward that has to sum over heads or positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.kernels._launch import Config, arch_of, cdiv, launch, pick, power_of_2, step, steps
from vdcore.kernels._tile import (
    Split,
    load_angles,
    load_rows,
    load_weight,
    norm_arguments,
    rope_arguments,
    rotate,
    row_sum,
    split_row,
    standardize,
    standardize_backward,
    store_rows,
)
from vdcore.norm import QKNorm
from vdcore.rope import Rope


@dataclass(frozen=True)
class LineConfig(Config):
    """values: channels times heads that a program holds at a time."""

    values: int = 4096


_LINES = "predicted: 32 values a thread are 4 loads of 16 bytes in flight, and heads of one token share its angles"
_TOKEN = "a norm over all heads holds a token's heads at once"
LINES = (
    LineConfig("interpreter", 4, 1, "few lines, so that a frame takes several programs", 256),
    LineConfig("", 4, 1, _LINES, 4096),
    LineConfig("", 8, 1, _TOKEN, 8192),
    LineConfig("", 16, 1, _TOKEN, 16384),
)
_SUMS = "predicted: rows, gradients and two sums of 16 values a thread each stay under 128 registers"
BACKWARD_LINES = (
    LineConfig("interpreter", 4, 1, "few lines, so that a frame takes several programs", 256),
    LineConfig("", 4, 1, _SUMS, 2048),
    LineConfig("", 8, 1, _TOKEN, 4096),
    LineConfig("", 16, 1, _TOKEN, 8192),
    LineConfig("", 32, 1, _TOKEN, 16384),
)
MAX_TOKEN = 16384  # heads times channels, each as wide as its tile, of a norm over all heads


@triton.jit
def _frame_lines(i, T, S, H, BN: tl.constexpr, ALL: tl.constexpr):
    """Of block i: sample and frame, and its lines (token, head) in the frame, [BN].

    With ALL a block is one token, else any BN lines of a frame.
    """
    count = H if ALL else BN
    blocks = tl.cdiv(S * H, count)
    i_bt = (i // blocks).to(tl.int64)
    o_n = (i % blocks) * count + tl.arange(0, BN)
    m_n = (o_n < S * H) & (tl.arange(0, BN) < count)
    return i_bt // T, i_bt % T, o_n, m_n


@triton.jit
def norm_rope_fwd_kernel(
    p_x,  # (B, T, S, H, D)
    p_y,  # (B, T, S, H, D), contiguous
    p_w,  # (D,), (H*D,) with ALL, or None
    p_b,
    eps,
    p_cos,  # (F, S, H, R/2) with stride 0 where it does not vary, or None
    p_sin,
    s_cf,
    s_cs,
    s_ch,
    s_sf,
    s_ss,
    s_sh,
    s_xb,  # in steps of A elements
    s_xt,
    s_xs,
    s_xh,
    T,
    S,
    H,
    frame_start,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,  # lines
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    i_b, i_t, o_n, m_n = _frame_lines(tl.program_id(0), T, S, H, BN, ALL)
    o_s = (o_n // H).to(tl.int64)
    o_h = (o_n % H).to(tl.int64)
    o_x = (o_s * s_xs + o_h * s_xh) * A
    x0, x1 = load_rows(p_x + (i_b * s_xb + i_t * s_xt) * A, o_x, m_n, D, C0, W0, W1, HALF)  # [BN, W]
    y0, y1 = x0.to(tl.float32), x1.to(tl.float32)
    if KIND > 0:
        count = H * D if ALL else D
        y0, y1, _ = standardize(y0, y1, m_n, count, eps, D, C0, W0, W1, KIND, ALL)
        o_w = o_h * D if ALL else tl.arange(0, 1)
        if p_w is not None:
            w0, w1 = load_weight(p_w, o_w, D, C0, W0, W1, HALF)
            y0 *= w0
            y1 *= w1
        if p_b is not None:
            b0, b1 = load_weight(p_b, o_w, D, C0, W0, W1, HALF)
            y0 += b0
            y1 += b1
    if STYLE > 0:
        i_f = i_t + frame_start
        c0, c1 = load_angles(p_cos, i_f * s_cf + o_s * s_cs + o_h * s_ch, m_n, 1.0, C0, W0, W1, STYLE, R2)  # [BN, W/2]
        s0, s1 = load_angles(p_sin, i_f * s_sf + o_s * s_ss + o_h * s_sh, m_n, 0.0, C0, W0, W1, STYLE, R2)
        y0, y1 = rotate(y0, y1, c0, c1, s0, s1, W1, STYLE)
    o_y = ((i_b * T + i_t) * S * H + o_n) * D
    store_rows(p_y, o_y, m_n, y0, y1, D, C0, W0, W1, HALF)


@triton.jit
def norm_rope_bwd_kernel(
    p_x,
    p_dy,  # (B, T, S, H, D)
    p_dx,  # (B, T, S, H, D): token stride s_d, heads follow one another
    p_dw,  # partial sums (programs, D), with ALL (programs, H*D), float32; or None
    p_db,
    p_live,  # (B, T): frames that take part, or None: all
    p_w,
    p_b,
    eps,
    p_cos,
    p_sin,
    s_cf,
    s_cs,
    s_ch,
    s_sf,
    s_ss,
    s_sh,
    s_xb,  # in steps of A elements
    s_xt,
    s_xs,
    s_xh,
    s_yb,
    s_yt,
    s_ys,
    s_yh,
    s_d,
    T,
    S,
    H,
    frame_start,
    blocks,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    o_w = tl.arange(0, BN).to(tl.int64) * D if ALL else tl.arange(0, 1)
    m_w = tl.arange(0, BN) < H if ALL else tl.arange(0, 1) < 1
    w0 = tl.full([1, W0], 1.0, tl.float32)
    w1 = tl.full([1, W1 if W1 > 0 else W0], 1.0, tl.float32)
    if p_w is not None:
        w0, w1 = load_rows(p_w, o_w, m_w, D, C0, W0, W1, HALF)  # [1 or BN, W]
        w0, w1 = w0.to(tl.float32), w1.to(tl.float32)
    dw0 = tl.zeros([BN, W0], tl.float32)
    dw1 = tl.zeros([BN, W1 if W1 > 0 else W0], tl.float32)
    db0, db1 = dw0, dw1
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i_b, i_t, o_n, m_n = _frame_lines(i, T, S, H, BN, ALL)
        m_x = m_n
        if p_live is not None:
            m_x = m_n & (tl.load(p_live + i_b * T + i_t) > 0)
        o_s = (o_n // H).to(tl.int64)
        o_h = (o_n % H).to(tl.int64)
        o_y = (o_s * s_ys + o_h * s_yh) * A
        g0, g1 = load_rows(p_dy + (i_b * s_yb + i_t * s_yt) * A, o_y, m_x, D, C0, W0, W1, HALF)  # [BN, W]
        g0, g1 = g0.to(tl.float32), g1.to(tl.float32)
        if STYLE > 0:
            i_f = i_t + frame_start
            c0, c1 = load_angles(p_cos, i_f * s_cf + o_s * s_cs + o_h * s_ch, m_n, 1.0, C0, W0, W1, STYLE, R2)
            s0, s1 = load_angles(p_sin, i_f * s_sf + o_s * s_ss + o_h * s_sh, m_n, 0.0, C0, W0, W1, STYLE, R2)
            g0, g1 = rotate(g0, g1, c0, c1, -s0, -s1, W1, STYLE)
        if KIND > 0:
            o_x = (o_s * s_xs + o_h * s_xh) * A
            x0, x1 = load_rows(p_x + (i_b * s_xb + i_t * s_xt) * A, o_x, m_x, D, C0, W0, W1, HALF)
            count = H * D if ALL else D
            h0, h1, rstd = standardize(x0.to(tl.float32), x1.to(tl.float32), m_x, count, eps, D, C0, W0, W1, KIND, ALL)
            if p_dw is not None:
                dw0 += g0 * h0
                dw1 += g1 * h1
            if p_db is not None:
                db0 += g0
                db1 += g1
            g0, g1 = standardize_backward(g0 * w0, g1 * w1, h0, h1, rstd, m_x, count, D, C0, W0, W1, KIND, ALL)
        o_d = ((i_b * T + i_t) * S + o_s) * s_d + o_h * D
        store_rows(p_dx, o_d, m_n, g0, g1, D, C0, W0, W1, HALF)
    o_p = tl.program_id(0).to(tl.int64) * (H * D if ALL else D) + o_w
    if not ALL:
        dw0, db0 = tl.sum(dw0, 0, keep_dims=True), tl.sum(db0, 0, keep_dims=True)
        dw1, db1 = tl.sum(dw1, 0, keep_dims=True), tl.sum(db1, 0, keep_dims=True)
    if p_dw is not None:
        store_rows(p_dw, o_p, m_w, dw0, dw1, D, C0, W0, W1, HALF)
    if p_db is not None:
        store_rows(p_db, o_p, m_w, db0, db1, D, C0, W0, W1, HALF)


@triton.jit
def row_stats_kernel(
    p_x,  # (B, T, S, H, D)
    p_stats,  # (B, T, S, 2): mean (0 with KIND 1) and 1 / deviation, over all heads
    eps,
    s_xb,  # in steps of A elements
    s_xt,
    s_xs,
    s_xh,
    T,
    S,
    H,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
):
    i_b, i_t, o_n, m_n = _frame_lines(tl.program_id(0), T, S, H, BN, 1)
    o_x = ((o_n // H).to(tl.int64) * s_xs + (o_n % H).to(tl.int64) * s_xh) * A
    x0, x1 = load_rows(p_x + (i_b * s_xb + i_t * s_xt) * A, o_x, m_n, D, C0, W0, W1, HALF)
    x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    mean = row_sum(x0, x1, W1, 1) / (H * D)  # [1, 1]
    if KIND == 1:
        mean *= 0
    _, _, rstd = standardize(x0, x1, m_n, H * D, eps, D, C0, W0, W1, KIND, 1)
    p_row = p_stats + tl.program_id(0).to(tl.int64) * 2 + tl.zeros([1, 1], tl.int32)
    tl.store(p_row, mean)
    tl.store(p_row + 1, rstd)


@triton.jit
def rope_table_bwd_kernel(
    p_x,  # (B, T, S, H, D)
    p_dy,
    p_out,  # partial sums (chunks, 2, cells, R/2), float32: of cos and of sin
    p_stats,  # (B, T, S, 2) with ALL
    p_live,
    p_w,
    p_b,
    eps,
    s_xb,  # in steps of A elements
    s_xt,
    s_xs,
    s_xh,
    s_yb,
    s_yt,
    s_ys,
    s_yh,
    T,
    S,
    H,
    CT,  # frames, tokens and heads that the table tells apart: T, S, H or 1
    CS,
    CH,
    summed,  # lines that share a cell
    chunks,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
):
    i_cell = tl.program_id(0) // chunks
    i_chunk = tl.program_id(0) % chunks
    W: tl.constexpr = W0 if STYLE == 2 else W0 // 2
    V: tl.constexpr = W1 // 2 if STYLE == 1 and W1 > 0 else W
    dc0 = tl.zeros([BN, W], tl.float32)
    ds0 = dc0
    dc1 = tl.zeros([BN, V], tl.float32)
    ds1 = dc1
    NT, NS, NH = T // CT, S // CS, H // CH  # how many share
    for i in range(i_chunk * BN, summed, chunks * BN):
        o_j = i + tl.arange(0, BN)
        m_j = o_j < summed
        o_h = (i_cell % CH + o_j % NH).to(tl.int64)
        o_s = (i_cell // CH % CS + o_j // NH % NS).to(tl.int64)
        o_t = (i_cell // CH // CS + o_j // NH // NS % NT).to(tl.int64)
        o_b = (o_j // NH // NS // NT).to(tl.int64)
        if p_live is not None:
            m_j = m_j & (tl.load(p_live + o_b * T + o_t, mask=m_j, other=0) > 0)
        o_x = (o_b * s_xb + o_t * s_xt + o_s * s_xs + o_h * s_xh) * A
        o_y = (o_b * s_yb + o_t * s_yt + o_s * s_ys + o_h * s_yh) * A
        x0, x1 = load_rows(p_x, o_x, m_j, D, C0, W0, W1, HALF)  # [BN, W]
        g0, g1 = load_rows(p_dy, o_y, m_j, D, C0, W0, W1, HALF)
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
        g0, g1 = g0.to(tl.float32), g1.to(tl.float32)
        if KIND > 0:
            if ALL:
                o_r = ((o_b * T + o_t) * S + o_s) * 2
                mean = tl.load(p_stats + o_r, mask=m_j, other=0.0)[:, None]
                rstd = tl.load(p_stats + o_r + 1, mask=m_j, other=0.0)[:, None]
                x0, x1 = (x0 - mean) * rstd, (x1 - mean) * rstd
            else:
                x0, x1, _ = standardize(x0, x1, m_j, D, eps, D, C0, W0, W1, KIND, 0)
            o_w = o_h * D if ALL else tl.arange(0, 1)
            if p_w is not None:
                w0, w1 = load_weight(p_w, o_w, D, C0, W0, W1, HALF)
                x0 *= w0
                x1 *= w1
            if p_b is not None:
                b0, b1 = load_weight(p_b, o_w, D, C0, W0, W1, HALF)
                x0 += b0
                x1 += b1
        # (a cos - b sin, b cos + a sin) with gradients (da, db): d cos = a da + b db, d sin = a db - b da.
        if STYLE == 2:
            dc0 += x0 * g0 + x1 * g1
            ds0 += x0 * g1 - x1 * g0
        else:
            a, b = tl.split(tl.reshape(x0, (BN, W0 // 2, 2)))
            da, db = tl.split(tl.reshape(g0, (BN, W0 // 2, 2)))
            dc0 += a * da + b * db
            ds0 += a * db - b * da
            if W1 > 0:
                a, b = tl.split(tl.reshape(x1, (BN, W1 // 2, 2)))
                da, db = tl.split(tl.reshape(g1, (BN, W1 // 2, 2)))
                dc1 += a * da + b * db
                ds1 += a * db - b * da
    cells = CT * CS * CH
    p_cos = p_out + (i_chunk.to(tl.int64) * 2 * cells + i_cell) * R2
    p_sin = p_cos + cells.to(tl.int64) * R2
    r = tl.arange(0, W)
    tl.store(p_cos + r, tl.sum(dc0, 0), mask=r < R2)
    tl.store(p_sin + r, tl.sum(ds0, 0), mask=r < R2)
    if STYLE == 1 and W1 > 0:
        r = C0 // 2 + tl.arange(0, V)
        tl.store(p_cos + r, tl.sum(dc1, 0), mask=r < R2)
        tl.store(p_sin + r, tl.sum(ds1, 0), mask=r < R2)


def _lines(table: tuple[LineConfig, ...], x: Tensor, split: Split, all_heads: int) -> tuple[LineConfig, int]:
    """Config and lines a program: one token's heads with a norm over all of them."""
    W, H = split.W0 + split.W1, x.shape[3]
    need = W * power_of_2(H) if all_heads else W
    config = pick(table, arch_of(x), lambda row: row.values >= need)
    most = power_of_2(x.shape[2] * H)
    return config, power_of_2(H) if all_heads else min(max(power_of_2(config.values // W + 1) // 2, 1), most)


def fits(heads: int, D: int, norm: QKNorm | None) -> bool:
    """A norm over all heads holds a token in registers; other calls always fit."""
    return norm is None or norm.over != "all" or power_of_2(heads) * power_of_2(D) <= MAX_TOKEN


def norm_rope_forward(
    x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None, frame_start: int = 0, out: Tensor | None = None
) -> Tensor:
    """x ``(B, T, S, heads, D)`` -> the same, contiguous; ``role``: which of the norm's weights, ``"q"`` or ``"k"``."""
    B, T, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    split = split_row(D, rope)
    weights, norm_constants = norm_arguments(norm, role)
    tables, rope_constants = rope_arguments(rope)
    config, BN = _lines(LINES, x, split, norm_constants["ALL"])
    A = step(x)
    launch(
        norm_rope_fwd_kernel,
        B * T * cdiv(S * H, H if norm_constants["ALL"] else BN),
        x,
        config,
        *(x, y, *weights, *tables, *steps(x, A), T, S, H, frame_start),
        **split.constants(),
        A=A,
        BN=BN,
        **norm_constants,
        **rope_constants,
    )
    return y


def row_stats(x: Tensor, norm: QKNorm) -> Tensor:
    """Mean and 1 / deviation of each token over all its heads: x ``(B, T, S, heads, D)`` -> ``(B, T, S, 2)`` float32."""
    B, T, S, H, D = x.shape
    stats = torch.empty(B, T, S, 2, dtype=torch.float32, device=x.device)
    split = split_row(D)
    _, constants = norm_arguments(norm, "q")
    config, BN = _lines(LINES, x, split, 1)
    A = step(x)
    launch(
        row_stats_kernel,
        B * T * S,
        x,
        config,
        *(x, stats, norm.eps, *steps(x, A), T, S, H),
        **split.constants(),
        A=A,
        BN=BN,
        KIND=constants["KIND"],
    )
    return stats


# Programs of a backward, each with one partial sum of the weights' gradients: more than any GPU holds at a time.
_PROGRAMS = 2048


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
        live: ``(B, T)``: frames that take part; the others get 0, whatever x and dy hold there.
    """
    B, T, S, H, D = x.shape
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    found = {"x": dx}
    weights, norm_constants = norm_arguments(norm, role)
    for name, w in zip(("weight", "bias"), weights):
        if name in wanted and w is not None:
            found[name] = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
    if rope is not None and wanted & {"cos", "sin"}:
        for name in ("cos", "sin"):
            found[name] = torch.zeros(rope.cos.shape, dtype=torch.float32, device=x.device)
    if not x.numel():
        return found

    split = split_row(D, rope)
    tables, rope_constants = rope_arguments(rope)
    config, BN = _lines(BACKWARD_LINES, x, split, norm_constants["ALL"])
    A = step(x, dy)
    blocks = B * T * cdiv(S * H, H if norm_constants["ALL"] else BN)
    programs = min(blocks, _PROGRAMS)
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
        *(x, dy, dx, partial.get("weight"), partial.get("bias"), live, *weights, *tables),
        *(*steps(x, A), *steps(dy, A), dx.stride(2), T, S, H, frame_start, blocks),
        **split.constants(),
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
    split = split_row(D, rope)
    weights, norm_constants = norm_arguments(norm, role)
    _, rope_constants = rope_arguments(rope)
    stats = None
    if norm is not None and norm.over == "all":
        stats = row_stats(x, norm)
    shape = rope.cos.shape if rope.cos.ndim == 4 else (*rope.cos.shape[:2], 1, rope.cos.shape[2])
    cells = (T if shape[0] > 1 else 1, shape[1], shape[2])
    count = cells[0] * cells[1] * cells[2]
    summed = B * T * S * H // count
    config, BN = _lines(BACKWARD_LINES, x, split, 0)
    chunks = max(min(cdiv(1024, count), cdiv(summed, BN)), 1)
    partial = torch.empty(chunks, 2, *cells, shape[3], dtype=torch.float32, device=x.device)
    A = step(x, dy)
    launch(
        rope_table_bwd_kernel,
        count * chunks,
        x,
        config,
        *(x, dy, partial, stats, live, *weights, *steps(x, A), *steps(dy, A), T, S, H, *cells, summed, chunks),
        **split.constants(),
        A=A,
        BN=BN,
        **norm_constants,
        **rope_constants,
    )
    total = partial.sum(0)
    first = frame_start if shape[0] > 1 else 0
    for name, part in zip(("cos", "sin"), total):
        found[name].view(shape)[first : first + cells[0]] = part
