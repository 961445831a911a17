"""Norm and rotary embedding of queries or keys, forward.

Bound by memory: a row is read once, normalized and rotated in registers, and written once. Attention kernels that are
bound by arithmetic normalize and rotate through these, and so does every backward that has to sum over heads or
positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import (
    NormRope,
    Row,
    affine,
    filled,
    load_affine,
    load_angles,
    load_rows,
    norm_arguments,
    norm_rope_constants,
    rope_arguments,
    rotate,
    row_sum,
    rows,
    scale,
    split_row,
    standardize,
    store_rows,
    to,
)

ROWS = (
    ValuesConfig("interpreter", 4, 1, "so few rows that a small case takes several programs", 1024),
    ValuesConfig("", 4, 1, "32 values a thread: 4 loads of 16 bytes", 4096),
)
# Of a norm over all heads: a token's heads at once, in blocks that are no more than there are: 24 as three times 8.
TOKENS = (
    ValuesConfig("", 2, 1, "32 values a thread at most, 4 loads of 16 bytes", 2048),
    ValuesConfig("", 4, 1, "40 values a thread at most: five blocks of 8 heads of 128 channels", 5120),
    ValuesConfig("", 8, 1, "32 values a thread at most", 8192),
)


class RowTile(NamedTuple):
    """Constants: rows and elements per step of a stride, rows of a block, norm and rotary embedding, and how many
    blocks of heads a token has where a norm is over all of them.
    """

    ROW: Row
    A: int
    BN: int
    NR: NormRope
    BLOCKS: int


@triton.jit
def row_block(i, T, S, H, BN: tl.constexpr, ALL: tl.constexpr):
    """Of the i-th of all frames' blocks: sample, frame, and its rows (token, head), [BN]: number, token, head, mask.

    With ALL a block is one token, [1], of which these are the first heads, else any BN rows of a frame.
    """
    if ALL:
        i_bt = (i // S).to(tl.int64)
        o_s, o_h = i % S + tl.arange(0, 1), tl.arange(0, BN)
        o_n, m_n = o_s * H + o_h, o_h < H
    else:
        blocks = tl.cdiv(S * H, BN)
        i_bt = (i // blocks).to(tl.int64)
        o_n = (i % blocks) * BN + tl.arange(0, BN)
        o_s, o_h, m_n = o_n // H, o_n % H, o_n < S * H
    return i_bt // T, i_bt % T, o_n, o_s.to(tl.int64), o_h.to(tl.int64), m_n


@triton.jit
def load_block(x, i_b, i_t, o_s, o_h, m_n, TILE: tl.constexpr):
    """Rows (token, head) of a frame of Rows x: tiles [BN, W], and behind them the token's other blocks of heads."""
    ROW: tl.constexpr = TILE.ROW
    BLOCKS: tl.constexpr = TILE.BLOCKS
    A: tl.constexpr = TILE.A
    p = x.p + (i_b * x.b + i_t * x.t) * A
    b_x = load_rows(p, (o_s * x.s + o_h * x.h) * A, m_n, ROW)
    for i in tl.static_range(1, BLOCKS):
        b_x += load_rows(p, (o_s * x.s + (o_h + i * TILE.BN) * x.h) * A, m_n, ROW)
    return b_x


@triton.jit
def zero_block(TILE: tl.constexpr):
    """Such tiles of zeros, float32."""
    ROW: tl.constexpr = TILE.ROW
    BLOCKS: tl.constexpr = TILE.BLOCKS
    b_x = filled(TILE.BN, 0.0, ROW)
    for _ in tl.static_range(1, BLOCKS):
        b_x += filled(TILE.BN, 0.0, ROW)
    return b_x


@triton.jit
def store_block(p, o_row, m_n, b_x, TILE: tl.constexpr):
    """Stores such tiles; a token's heads follow one another."""
    ROW: tl.constexpr = TILE.ROW
    BLOCKS: tl.constexpr = TILE.BLOCKS
    if BLOCKS == 1:
        store_rows(p, o_row, m_n, b_x, ROW)
    else:
        for i in tl.static_range(BLOCKS):
            store_rows(p, o_row + i * TILE.BN * ROW.D, m_n, (b_x[i],), ROW)


@triton.jit
def load_block_affine(norm, o_h, m_n, TILE: tl.constexpr):
    """load_affine for heads o_h [BN] and the token's other blocks."""
    ROW: tl.constexpr = TILE.ROW
    BLOCKS: tl.constexpr = TILE.BLOCKS
    ALL: tl.constexpr = TILE.NR.ALL
    b_w, b_b = load_affine(norm, o_h * ROW.D, m_n, ROW, ALL)
    for i in tl.static_range(1, BLOCKS):
        w, b = load_affine(norm, (o_h + i * TILE.BN) * ROW.D, m_n, ROW, ALL)
        b_w, b_b = b_w + w, b_b + b
    return b_w, b_b


@triton.jit
def row_angles(angles, i_f, o_s, o_h, m_n, SIGN, ROW: tl.constexpr, NR: tl.constexpr):
    """Cosines and SIGN times sines of rows (token, head) of frame i_f, [BN, W/2], or [1, W/2] for all heads of a token;
    1.0 and 0.0 without a table.
    """
    if NR.STYLE == 0:
        return 1.0, 0.0
    else:
        o_cos, o_sin = i_f * angles.cf + o_s * angles.cs, i_f * angles.sf + o_s * angles.ss
        m = m_n
        if NR.PER_HEAD:
            o_cos, o_sin = o_cos + o_h * angles.ch, o_sin + o_h * angles.sh
        elif NR.ALL:
            m = o_s >= 0  # there is the one token
        b_cos = load_angles(angles.cos, o_cos, m, 1.0, ROW, NR)
        return b_cos, scale(load_angles(angles.sin, o_sin, m, 0.0, ROW, NR), SIGN)


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start"])
def norm_rope_fwd_kernel(x, p_y, norm, angles, T, S, H, frame_start, TILE: tl.constexpr):
    """One program: BN rows (token, head) of one frame, with ALL one token's.

    x: Rows (B, T, S, H, D). p_y: (B, T, S, H, D), contiguous. frame_start: the table's row of frame 0.
    """
    ROW: tl.constexpr = TILE.ROW
    BN: tl.constexpr = TILE.BN
    NR: tl.constexpr = TILE.NR
    i_b, i_t, o_n, o_s, o_h, m_n = row_block(tl.program_id(0), T, S, H, BN, NR.ALL)
    b_x = load_block(x, i_b, i_t, o_s, o_h, m_n, TILE)
    # All that is read is on its way before the norm waits for a row's sum: a barrier is a second trip to memory.
    b_w, b_b = load_block_affine(norm, o_h, m_n, TILE)
    b_cos, b_sin = row_angles(angles, i_t + frame_start, o_s, o_h, m_n, 1.0, ROW, NR)
    b_y = to(b_x, tl.float32)
    if NR.KIND > 0:
        b_y, _ = standardize(b_y, m_n, H * ROW.D if NR.ALL else ROW.D, norm.eps, ROW, NR.KIND, NR.ALL)
        b_y = affine(b_y, norm, b_w, b_b)
    if NR.STYLE > 0:
        b_y = rotate(b_y, b_cos, b_sin, NR.STYLE)
    store_block(p_y, ((i_b * T + i_t) * S * H + o_n) * ROW.D, m_n, b_y, TILE)


@triton.jit(do_not_specialize=["T", "S", "H"])
def row_stats_kernel(x, p_stats, eps, T, S, H, TILE: tl.constexpr):
    """One program: one token. x: Rows (B, T, S, H, D). p_stats: (B, T, S, 2), mean (0 with KIND 1), 1 / deviation."""
    KIND: tl.constexpr = TILE.NR.KIND
    ROW: tl.constexpr = TILE.ROW
    BN: tl.constexpr = TILE.BN
    i_b, i_t, o_n, o_s, o_h, m_n = row_block(tl.program_id(0), T, S, H, BN, 1)
    b_x = to(load_block(x, i_b, i_t, o_s, o_h, m_n, TILE), tl.float32)
    mean = tl.zeros([1, 1], tl.float32)
    if KIND == 2:
        mean = row_sum(b_x, 1) / (H * ROW.D)
    _, rstd = standardize(b_x, m_n, H * ROW.D, eps, ROW, KIND, 1)
    p_row = p_stats + tl.program_id(0).to(tl.int64) * 2 + tl.zeros([1, 1], tl.int32)
    tl.store(p_row, mean)
    tl.store(p_row + 1, rstd)


Table = TypeVar("Table", bound=ValuesConfig)


def row_arguments(
    table: tuple[Table, ...],
    x: Tensor,
    norm: QKNorm | None,
    rope: Rope | None,
    *,
    over_all: bool,
    also: Tensor | None = None,
) -> tuple[Table, RowTile, dict[str, Any]]:
    """The config, constants, and what all kernels take by the same names.

    over_all: a program holds one token's heads. also: a tensor with the same steps.
    """
    _, T, S, H, D = x.shape
    row, NR = split_row(D, rope), norm_rope_constants(norm, rope)
    if over_all:
        config, BN, blocks = _heads_of_a_token(table, x, row, NR)
    else:
        config, blocks = pick(table, arch_of(x), lambda c: c.values >= row.width), 1
        BN = min(how_many(config.values, row.width), power_of_2(S * H))
    A = step(x) if also is None else step(x, also)
    tile = RowTile(row, A, BN, NR, blocks)
    return config, tile, {"like": x, "config": config, "x": rows(x, A), "T": T, "S": S, "H": H, "TILE": tile}


def _heads_of_a_token(table: tuple[Table, ...], x: Tensor, row: Row, NR: NormRope) -> tuple[Table, int, int]:
    """The config, the heads of a block and how many blocks a token has: one of a power of two of heads, or several
    without a place too many, each of at least 16 bytes a thread.
    """
    H, arch = x.shape[3], arch_of(x)
    exact, whole = H & -H, power_of_2(H)
    if row.W1 == 0 and not NR.PER_HEAD and 1 < H // exact <= 5:
        config = pick(table, arch, lambda c: c.values >= H * row.width)
        if exact * row.width * x.element_size() >= config.warps * 32 * 16:
            return config, exact, H // exact
    return pick(table, arch, lambda c: c.values >= whole * row.width), whole, 1


def blocks_of(x: Tensor, BN: int, over_all: bool) -> int:
    """How many blocks row_block knows."""
    B, T, S, H, _ = x.shape
    return B * T * cdiv(S * H, H if over_all else BN)


def is_over_all(norm: QKNorm | None) -> bool:
    return norm is not None and norm.over == "all"


def norm_rope_forward(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None, frame_start: int = 0) -> Tensor:
    """x ``(B, T, S, heads, D)`` -> the same, contiguous; ``role``: which of the norm's weights, ``"q"`` or ``"k"``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    over_all = is_over_all(norm)
    _, tile, shared = row_arguments(TOKENS if over_all else ROWS, x, norm, rope, over_all=over_all)
    of_role: dict[str, Any] = {
        "norm": norm_arguments(norm, role),
        "angles": rope_arguments(rope),
        "frame_start": frame_start,
    }
    launch(norm_rope_fwd_kernel, blocks_of(x, tile.BN, over_all), p_y=y, **of_role, **shared)
    return y


def row_stats(x: Tensor, norm: QKNorm | None) -> Tensor | None:
    """Mean and 1 / deviation of every token of x ``(B, T, S, heads, D)`` over all its heads: ``(B, T, S, 2)``.

    None where the norm takes none.
    """
    if norm is None or norm.over != "all":
        return None
    stats = torch.empty(*x.shape[:3], 2, dtype=torch.float32, device=x.device)
    _, _, shared = row_arguments(TOKENS, x, norm, None, over_all=True)
    launch(row_stats_kernel, x.shape[0] * x.shape[1] * x.shape[2], p_stats=stats, eps=norm.eps, **shared)
    return stats
