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

_ROWS = "32 values a thread: 4 loads of 16 bytes, and heads of one token share its angles"
WHOLE_TOKEN = "a norm over all heads holds a token's heads at once"
ROWS = (
    ValuesConfig("interpreter", 4, 1, "so few rows that a small case takes several programs", 1024),
    ValuesConfig("", 4, 1, _ROWS, 4096),
    ValuesConfig("", 8, 1, WHOLE_TOKEN, 8192),
)


class RowTile(NamedTuple):
    """Constants: rows and elements per step of a stride, rows of a program, norm and rotary embedding."""

    ROW: Row
    A: int
    BN: int
    NR: NormRope


@triton.jit
def row_block(i, T, S, H, BN: tl.constexpr, ALL: tl.constexpr):
    """Of the i-th of all frames' blocks: sample, frame, and its rows (token, head), [BN]: number, token, head, mask.

    With ALL a block is one token, else any BN rows of a frame.
    """
    count = H if ALL else BN
    blocks = tl.cdiv(S * H, count)
    i_bt = (i // blocks).to(tl.int64)
    o_n = (i % blocks) * count + tl.arange(0, BN)
    m_n = (o_n < S * H) & (tl.arange(0, BN) < count)
    return i_bt // T, i_bt % T, o_n, (o_n // H).to(tl.int64), (o_n % H).to(tl.int64), m_n


@triton.jit
def row_angles(angles, i_f, o_s, o_h, m_n, SIGN, ROW: tl.constexpr, NR: tl.constexpr):
    """Cosines and SIGN times sines of rows (token, head) of frame i_f, [BN, W/2]."""
    o_cos = i_f * angles.cf + o_s * angles.cs + o_h * angles.ch
    b_cos = load_angles(angles.cos, o_cos, m_n, 1.0, ROW, NR)
    o_sin = i_f * angles.sf + o_s * angles.ss + o_h * angles.sh
    return b_cos, scale(load_angles(angles.sin, o_sin, m_n, 0.0, ROW, NR), SIGN)


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start"])
def norm_rope_fwd_kernel(x, p_y, norm, angles, T, S, H, frame_start, TILE: tl.constexpr):
    """One program: BN rows (token, head) of one frame, with ALL one token's.

    x: Rows (B, T, S, H, D). p_y: (B, T, S, H, D), contiguous. frame_start: the table's row of frame 0.
    """
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    BN: tl.constexpr = TILE.BN
    NR: tl.constexpr = TILE.NR
    i_b, i_t, o_n, o_s, o_h, m_n = row_block(tl.program_id(0), T, S, H, BN, NR.ALL)
    b_x = load_rows(x.p + (i_b * x.b + i_t * x.t) * A, (o_s * x.s + o_h * x.h) * A, m_n, ROW)  # [BN, W]
    b_y = to(b_x, tl.float32)
    if NR.KIND > 0:
        b_y, _ = standardize(b_y, m_n, H * ROW.D if NR.ALL else ROW.D, norm.eps, ROW, NR.KIND, NR.ALL)
        b_y = affine(b_y, norm, o_h * ROW.D, m_n, ROW, NR.ALL)
    if NR.STYLE > 0:
        b_cos, b_sin = row_angles(angles, i_t + frame_start, o_s, o_h, m_n, 1.0, ROW, NR)
        b_y = rotate(b_y, b_cos, b_sin, NR.STYLE)
    store_rows(p_y, ((i_b * T + i_t) * S * H + o_n) * ROW.D, m_n, b_y, ROW)


@triton.jit(do_not_specialize=["T", "S", "H"])
def row_stats_kernel(x, p_stats, eps, T, S, H, TILE: tl.constexpr):
    """One program: one token. x: Rows (B, T, S, H, D). p_stats: (B, T, S, 2), mean (0 with KIND 1), 1 / deviation."""
    KIND: tl.constexpr = TILE.NR.KIND
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    BN: tl.constexpr = TILE.BN
    i_b, i_t, o_n, o_s, o_h, m_n = row_block(tl.program_id(0), T, S, H, BN, 1)
    b_x = to(load_rows(x.p + (i_b * x.b + i_t * x.t) * A, (o_s * x.s + o_h * x.h) * A, m_n, ROW), tl.float32)
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
    row = split_row(D, rope)
    size = row.width * power_of_2(H) if over_all else row.width
    config = pick(table, arch_of(x), lambda c: c.values >= size)
    BN = power_of_2(H) if over_all else min(how_many(config.values, row.width), power_of_2(S * H))
    A = step(x) if also is None else step(x, also)
    tile = RowTile(row, A, BN, norm_rope_constants(norm, rope))
    return config, tile, {"like": x, "config": config, "x": rows(x, A), "T": T, "S": S, "H": H, "TILE": tile}


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
    _, tile, shared = row_arguments(ROWS, x, norm, rope, over_all=over_all)
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
    _, _, shared = row_arguments(ROWS, x, norm, None, over_all=True)
    launch(row_stats_kernel, x.shape[0] * x.shape[1] * x.shape[2], p_stats=stats, eps=norm.eps, **shared)
    return stats
