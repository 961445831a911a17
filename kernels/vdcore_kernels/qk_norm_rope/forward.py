"""Norm and rotary embedding of queries or keys, forward.

Bound by memory: a row is read once, normalized and rotated in registers, and written once. Attention kernels that are
bound by arithmetic normalize and rotate through these, and so does every backward that has to sum over heads or
positions.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import (
    KINDS,
    Row,
    affine,
    cos_sin,
    load_rows,
    norm_arguments,
    norm_rope_constants,
    rope_arguments,
    rotate,
    row_sum,
    rows,
    split_row,
    standardize,
    store_rows,
    to,
)

_ROWS = "predicted: 32 values per thread are 4 loads of 16 bytes in flight, and heads of one token share its angles"
WHOLE_TOKEN = "a norm over all heads holds a token's heads at once"
ROWS = (
    ValuesConfig("interpreter", 4, 1, "so few rows that a small case takes several programs", 1024),
    ValuesConfig("", 4, 1, _ROWS, 4096),
    ValuesConfig("", 8, 1, WHOLE_TOKEN, 8192),
)


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
    return cos_sin(angles, o_cos, i_f * angles.sf + o_s * angles.ss + o_h * angles.sh, m_n, SIGN, ROW, NR)


@triton.jit(do_not_specialize=["T", "S", "H", "frame_start"])
def norm_rope_fwd_kernel(
    x,
    p_y,
    norm,
    angles,
    T,
    S,
    H,
    frame_start,  # the table's row of frame 0
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,  # rows
    NR: tl.constexpr,
):
    """One program: BN rows (token, head) of one frame, with ALL one token's. x: Rows (B, T, S, H, D); p_y: too."""
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
def row_stats_kernel(
    x, p_stats, eps, T, S, H, ROW: tl.constexpr, A: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr
):
    """One program: one token. x: Rows (B, T, S, H, D). p_stats: (B, T, S, 2), mean (0 with KIND 1), 1 / deviation."""
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


def pick_rows(table: tuple[Table, ...], x: Tensor, row: Row, over_all: bool) -> tuple[Table, int]:
    """Config and rows per program: one token's heads with a norm over all of them."""
    H = x.shape[3]
    size = row.width * power_of_2(H) if over_all else row.width
    config = pick(table, arch_of(x), lambda c: c.values >= size)
    if over_all:
        return config, power_of_2(H)
    return config, min(how_many(config.values, row.width), power_of_2(x.shape[2] * H))


def blocks_of(x: Tensor, BN: int, over_all: bool) -> int:
    """How many blocks row_block knows."""
    B, T, S, H, _ = x.shape
    return B * T * cdiv(S * H, H if over_all else BN)


def norm_rope_forward(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None, frame_start: int = 0) -> Tensor:
    """x ``(B, T, S, heads, D)`` -> the same, contiguous; ``role``: which of the norm's weights, ``"q"`` or ``"k"``."""
    _, T, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    row = split_row(D, rope)
    over_all = norm is not None and norm.over == "all"
    config, BN = pick_rows(ROWS, x, row, over_all)
    A = step(x)
    launch(
        norm_rope_fwd_kernel,
        blocks_of(x, BN, over_all),
        like=x,
        config=config,
        x=rows(x, A),
        p_y=y,
        norm=norm_arguments(norm, role),
        angles=rope_arguments(rope),
        T=T,
        S=S,
        H=H,
        frame_start=frame_start,
        ROW=row,
        A=A,
        BN=BN,
        NR=norm_rope_constants(norm, rope),
    )
    return y


def row_stats(x: Tensor, norm: QKNorm) -> Tensor:
    """Mean and 1 / deviation of every token of x ``(B, T, S, heads, D)`` over all its heads: ``(B, T, S, 2)``."""
    B, T, S, H, D = x.shape
    stats = torch.empty(B, T, S, 2, dtype=torch.float32, device=x.device)
    row = split_row(D)
    config, BN = pick_rows(ROWS, x, row, True)
    A = step(x)
    numbers: dict[str, Any] = {"eps": norm.eps, "T": T, "S": S, "H": H}
    constants: dict[str, Any] = {"ROW": row, "A": A, "BN": BN, "KIND": KINDS[norm.kind]}
    launch(row_stats_kernel, B * T * S, like=x, config=config, x=rows(x, A), p_stats=stats, **numbers, **constants)
    return stats
