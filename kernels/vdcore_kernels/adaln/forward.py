"""Adaptive layer norm: modulate and gate_residual, forward.

All of it is bound by memory: every tensor is read once and written once. A tile holds rows of one frame, so that a
shift or scale that its tokens share is loaded once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import KINDS
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2
from vdcore_kernels.core.tile import (
    Norm,
    Rows,
    add,
    affine,
    contiguous,
    load_affine,
    load_rows,
    mul,
    split_row,
    standardize,
    store_rows,
    to,
)
from vdcore_kernels.core.token_rows import contiguous_rows, frame_block, row_arguments, rows_from, token_rows

_WARP = "a row inside one warp needs no barrier; 2,560 channels are 10 loads of 16 bytes a thread and tensor"
_WIDE = "the same values a thread for wider rows"
SMALL = ValuesConfig("interpreter", 4, 1, "two rows of a small case, so that tiles of rows are exercised", 512)
ROWS = (
    SMALL,
    ValuesConfig("", 1, 1, _WARP, 2560),
    ValuesConfig("", 2, 1, _WIDE, 4096),
    ValuesConfig("", 4, 1, _WIDE, 8192),
)
MAX_CHANNELS = 8192


@triton.jit
def table_rows(table, at, ROW: tl.constexpr, PER_TOKEN: tl.constexpr):
    """A shift, scale or gate for rows of a frame in float32: [BR, W], or [1, W] where tokens share it."""
    i_b, i_t, o_s, m_s = at
    p = table.p + i_b * table.b + i_t * table.t
    if PER_TOKEN:
        return to(load_rows(p, o_s * table.s, m_s, ROW), tl.float32)
    else:
        return to(load_rows(p, tl.arange(0, 1), tl.full([1], 1, tl.int1), ROW), tl.float32)


@triton.jit(do_not_specialize=["T", "S"])
def modulate_fwd_kernel(
    x,
    p_y,
    norm,
    shift,
    scale,
    T,
    S,
    ROW: tl.constexpr,
    BR: tl.constexpr,  # rows
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,  # the shift varies with the token
    SCALE_ROWS: tl.constexpr,
):
    """One program: BR tokens of one frame. x: Rows (B, T, S, C); p_y: the same, contiguous; shift, scale: Rows, strides
    0 where they do not vary.
    """
    i_b, i_t, first = frame_block(tl.program_id(0), T, S, BR)
    at = rows_from(i_b, i_t, first, S, BR)
    i_b, i_t, o_s, m_s = at
    b_x = token_rows(x, at, ROW)  # [BR, W]
    b_f = table_rows(shift, at, ROW, SHIFT_ROWS)  # [BR or 1, W]
    b_c = table_rows(scale, at, ROW, SCALE_ROWS)
    b_y, _ = standardize(to(b_x, tl.float32), m_s, ROW.D, norm.eps, ROW, KIND, 0)
    b_w, b_b = load_affine(norm, o_s, m_s, ROW, 0)  # not above: its registers would cost two programs
    b_y = affine(b_y, norm, b_w, b_b)
    b_y = add(add(b_y, mul(b_y, b_c)), b_f)
    store_rows(p_y, contiguous_rows(at, T, S, ROW), m_s, b_y, ROW)


@triton.jit(do_not_specialize=["T", "S"])
def gate_residual_fwd_kernel(
    residual, x, gate, p_y, T, S, ROW: tl.constexpr, BR: tl.constexpr, GATE_ROWS: tl.constexpr
):
    """One program: BR tokens of one frame. residual, x: Rows (B, T, S, C). p_y: the same, contiguous. gate: Rows,
    strides 0 where it is shared; GATE_ROWS: it varies with the token.
    """
    i_b, i_t, first = frame_block(tl.program_id(0), T, S, BR)
    at = rows_from(i_b, i_t, first, S, BR)
    b_r = token_rows(residual, at, ROW)  # [BR, W]
    b_x = token_rows(x, at, ROW)
    b_g = table_rows(gate, at, ROW, GATE_ROWS)  # [BR or 1, W]
    b_y = add(to(b_r, tl.float32), mul(to(b_x, tl.float32), b_g))
    store_rows(p_y, contiguous_rows(at, T, S, ROW), at[3], b_y, ROW)


def table_arguments(x: Tensor) -> Rows:
    """A shift, scale or gate ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)`` as rows of every token."""
    s = x.stride()
    return Rows(x, s[0], s[1] if x.ndim > 2 else 0, s[2] if x.ndim > 3 else 0, 0)


def common_arguments(table: tuple[ValuesConfig, ...], x: Tensor) -> tuple[int, dict[str, Any]]:
    """Rows per program, and what all kernels take by the same names."""
    _, T, S, C = x.shape
    row = split_row(C)
    config = pick(table, arch_of(x), lambda c: c.values >= row.width)
    BR = min(how_many(config.values, row.width), power_of_2(S))
    return BR, {"like": x, "config": config, "x": row_arguments(x), "T": T, "S": S, "ROW": row, "BR": BR}


def modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """x ``(B, T, S, C)``, shift and scale ``(B, [T, [S,]] C)``, weight and bias ``(C,)`` -> ``(B, T, S, C)``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    BR, shared = common_arguments(ROWS, x)
    launch(
        modulate_fwd_kernel,
        x.shape[0] * x.shape[1] * cdiv(x.shape[2], BR),
        p_y=y,
        norm=Norm(contiguous(weight), contiguous(bias), eps),
        shift=table_arguments(shift),
        scale=table_arguments(scale),
        KIND=KINDS[kind],
        SHIFT_ROWS=shift.ndim == 4,
        SCALE_ROWS=scale.ndim == 4,
        **shared,
    )
    return y


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual and x ``(B, T, S, C)``, gate ``(B, [T, [S,]] C)`` -> ``residual + gate * x``."""
    y = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if not y.numel():
        return y
    BR, shared = common_arguments(ROWS, x)
    launch(
        gate_residual_fwd_kernel,
        x.shape[0] * x.shape[1] * cdiv(x.shape[2], BR),
        residual=row_arguments(residual),
        gate=table_arguments(gate),
        p_y=y,
        GATE_ROWS=gate.ndim == 4,
        **shared,
    )
    return y
