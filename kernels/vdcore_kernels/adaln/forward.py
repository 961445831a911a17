"""Adaptive layer norm: modulate and gate_residual, forward and backward.

All of it is bound by memory: every tensor is read once and written once. A tile holds rows of one frame, so that a
shift or scale that its tokens share is loaded once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick, power_of_2
from vdcore_kernels.core.tile import (
    KINDS,
    Norm,
    Row,
    Rows,
    add,
    affine,
    by_weight,
    column_sum,
    filled,
    load_rows,
    mul,
    split_row,
    standardize,
    standardize_backward,
    store_rows,
    to,
)


@dataclass(frozen=True)
class RowConfig(Config):
    """values: channels times rows that a program holds at a time."""

    values: int = 4096


_WARP = (
    "predicted: a row inside one warp needs no barrier; two rows of 1,152 channels are 9 loads of 16 bytes a thread, "
    "and 16 programs an SM keep 70 KB in flight, twice what its share of the memory takes to cover"
)
_WIDE = "predicted: the same values a thread for wider rows"
_SUMS = "predicted: two rows' tiles and up to four sums, 20 values a thread each, stay clear of spilling"
ROWS = (
    RowConfig("interpreter", 4, 1, "two rows of a small case, so that tiles of rows are exercised", 512),
    RowConfig("", 1, 1, _WARP, 2560),
    RowConfig("", 2, 1, _WIDE, 4096),
    RowConfig("", 4, 1, _WIDE, 8192),
)
BACKWARD_ROWS = (
    RowConfig("interpreter", 4, 1, "two rows of a small case, so that tiles of rows are exercised", 512),
    RowConfig("", 2, 1, _SUMS, 1280),
    RowConfig("", 4, 1, _SUMS, 2560),
    RowConfig("", 8, 1, _SUMS, 5120),
    RowConfig("", 16, 1, _SUMS, 8192),
)
MAX_CHANNELS = 8192
_WIDE_SUMS = 5120


@triton.jit
def table_rows(table, i_b, i_t, o_s, m_s, ROW: tl.constexpr, PER_TOKEN: tl.constexpr):
    """A shift, scale or gate for rows of a frame in float32: [BR, W], or [1, W] where tokens share it."""
    p = table.p + i_b * table.b + i_t * table.t
    if PER_TOKEN:
        return to(load_rows(p, o_s * table.s, m_s, ROW), tl.float32)
    else:
        return to(load_rows(p, tl.arange(0, 1), tl.full([1], 1, tl.int1), ROW), tl.float32)


@triton.jit
def frame_rows(i, T, S, rows):
    """Sample and frame of the i-th of all frames' blocks of ``rows`` rows, and its first row."""
    blocks = tl.cdiv(S, rows)
    i_bt = (i // blocks).to(tl.int64)
    return i_bt // T, i_bt % T, (i % blocks) * rows


@triton.jit(do_not_specialize=["T", "S"])
def modulate_fwd_kernel(
    x,  # Rows (B, T, S, C)
    p_y,  # (B, T, S, C), contiguous
    norm,
    shift,  # Rows, strides 0 where it does not vary
    mult,
    T,
    S,
    ROW: tl.constexpr,
    BR: tl.constexpr,  # rows
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    i_b, i_t, first = frame_rows(tl.program_id(0), T, S, BR)
    o_s = first + tl.arange(0, BR)
    m_s = o_s < S
    o_s = o_s.to(tl.int64)
    b_x = load_rows(x.p + i_b * x.b + i_t * x.t, o_s * x.s, m_s, ROW)  # [BR, W]
    b_f = table_rows(shift, i_b, i_t, o_s, m_s, ROW, SHIFT_ROWS)  # [BR or 1, W]
    b_c = table_rows(mult, i_b, i_t, o_s, m_s, ROW, SCALE_ROWS)
    b_y, _ = standardize(to(b_x, tl.float32), m_s, ROW.D, norm.eps, ROW, KIND, 0)
    b_y = affine(b_y, norm, o_s, m_s, ROW, 0)
    b_y = add(add(b_y, mul(b_y, b_c)), b_f)
    store_rows(p_y, ((i_b * T + i_t) * S + o_s) * ROW.D, m_s, b_y, ROW)


@triton.jit(do_not_specialize=["T", "S", "rows"])
def modulate_bwd_kernel(
    x,
    dy,
    norm,
    mult,
    p_dx,  # (B, T, S, C), contiguous, or None
    p_dshift,  # partial sums (B*T, chunks, C), float32; rows (B, T, S, C) with SHIFT_ROWS; None: not wanted
    p_dscale,
    p_dw,  # partial sums (B*T, chunks, C), float32, or None
    p_db,
    T,
    S,
    rows,  # of a chunk, a multiple of BR
    ROW: tl.constexpr,
    BR: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    i_b, i_t, first = frame_rows(tl.program_id(0), T, S, rows)
    o_w, m_w = tl.arange(0, 1), tl.full([1], 1, tl.int1)
    # n = h w + b and y = n (1 + scale) + shift, with h the standardized row.
    b_dshift = filled(1, 0.0, ROW)
    b_dscale, b_dw, b_db = b_dshift, b_dshift, b_dshift
    for i in range(0, rows, BR):
        o_s = first + i + tl.arange(0, BR)
        m_s = o_s < S
        o_s = o_s.to(tl.int64)
        b_x = to(load_rows(x.p + i_b * x.b + i_t * x.t, o_s * x.s, m_s, ROW), tl.float32)  # [BR, W]
        b_g = to(load_rows(dy.p + i_b * dy.b + i_t * dy.t, o_s * dy.s, m_s, ROW), tl.float32)
        b_c = table_rows(mult, i_b, i_t, o_s, m_s, ROW, SCALE_ROWS)
        b_h, rstd = standardize(b_x, m_s, ROW.D, norm.eps, ROW, KIND, 0)
        o_y = ((i_b * T + i_t) * S + o_s) * ROW.D
        if p_dshift is not None:
            if SHIFT_ROWS:
                store_rows(p_dshift, o_y, m_s, b_g, ROW)
            else:
                b_dshift = add(b_dshift, column_sum(b_g))
        if p_dscale is not None:
            b_d = mul(b_g, affine(b_h, norm, o_s, m_s, ROW, 0))
            if SCALE_ROWS:
                store_rows(p_dscale, o_y, m_s, b_d, ROW)
            else:
                b_dscale = add(b_dscale, column_sum(b_d))
        b_g = add(b_g, mul(b_g, b_c))
        if p_dw is not None:
            b_dw = add(b_dw, column_sum(mul(b_g, b_h)))
        if p_db is not None:
            b_db = add(b_db, column_sum(b_g))
        if p_dx is not None:
            b_g = standardize_backward(by_weight(b_g, norm, o_s, m_s, ROW, 0), b_h, rstd, m_s, ROW.D, ROW, KIND, 0)
            store_rows(p_dx, o_y, m_s, b_g, ROW)
    o_p = tl.program_id(0).to(tl.int64) * ROW.D + o_w
    if p_dshift is not None and not SHIFT_ROWS:
        store_rows(p_dshift, o_p, m_w, b_dshift, ROW)
    if p_dscale is not None and not SCALE_ROWS:
        store_rows(p_dscale, o_p, m_w, b_dscale, ROW)
    if p_dw is not None:
        store_rows(p_dw, o_p, m_w, b_dw, ROW)
    if p_db is not None:
        store_rows(p_db, o_p, m_w, b_db, ROW)


@triton.jit(do_not_specialize=["T", "S"])
def gate_residual_fwd_kernel(
    residual,  # Rows (B, T, S, C)
    x,
    gate,  # Rows, strides 0 where it does not vary
    p_y,  # (B, T, S, C), contiguous
    T,
    S,
    ROW: tl.constexpr,
    BR: tl.constexpr,
    GATE_ROWS: tl.constexpr,
):
    i_b, i_t, first = frame_rows(tl.program_id(0), T, S, BR)
    o_s = first + tl.arange(0, BR)
    m_s = o_s < S
    o_s = o_s.to(tl.int64)
    b_r = load_rows(residual.p + i_b * residual.b + i_t * residual.t, o_s * residual.s, m_s, ROW)  # [BR, W]
    b_x = load_rows(x.p + i_b * x.b + i_t * x.t, o_s * x.s, m_s, ROW)
    b_g = table_rows(gate, i_b, i_t, o_s, m_s, ROW, GATE_ROWS)  # [BR or 1, W]
    b_y = add(to(b_r, tl.float32), mul(to(b_x, tl.float32), b_g))
    store_rows(p_y, ((i_b * T + i_t) * S + o_s) * ROW.D, m_s, b_y, ROW)


@triton.jit(do_not_specialize=["T", "S", "rows"])
def gate_residual_bwd_kernel(
    x,
    gate,
    dy,
    p_dx,  # (B, T, S, C), contiguous, or None
    p_dg,  # partial sums (B*T, chunks, C), float32; rows (B, T, S, C) with GATE_ROWS; None: not wanted
    T,
    S,
    rows,  # of a chunk, a multiple of BR
    ROW: tl.constexpr,
    BR: tl.constexpr,
    GATE_ROWS: tl.constexpr,
):
    i_b, i_t, first = frame_rows(tl.program_id(0), T, S, rows)
    b_sum = filled(1, 0.0, ROW)
    for i in range(0, rows, BR):
        o_s = first + i + tl.arange(0, BR)
        m_s = o_s < S
        o_s = o_s.to(tl.int64)
        b_d = load_rows(dy.p + i_b * dy.b + i_t * dy.t, o_s * dy.s, m_s, ROW)  # [BR, W]
        o_y = ((i_b * T + i_t) * S + o_s) * ROW.D
        b_d = to(b_d, tl.float32)
        if p_dx is not None:
            store_rows(p_dx, o_y, m_s, mul(b_d, table_rows(gate, i_b, i_t, o_s, m_s, ROW, GATE_ROWS)), ROW)
        if p_dg is not None:
            b_x = load_rows(x.p + i_b * x.b + i_t * x.t, o_s * x.s, m_s, ROW)
            b_d = mul(b_d, to(b_x, tl.float32))
            if GATE_ROWS:
                store_rows(p_dg, o_y, m_s, b_d, ROW)
            else:
                b_sum = add(b_sum, column_sum(b_d))
    if p_dg is not None and not GATE_ROWS:
        o_p = tl.program_id(0).to(tl.int64) * ROW.D + tl.arange(0, 1)
        store_rows(p_dg, o_p, o_p >= 0, b_sum, ROW)


def _table(x: Tensor) -> Rows:
    """A shift, scale or gate ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)`` as rows of every token."""
    s = x.stride()
    return Rows(x, s[0], s[1] if x.ndim > 2 else 0, s[2] if x.ndim > 3 else 0, 0)


def _rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride()[:3], 0)


def _config(table: tuple[RowConfig, ...], x: Tensor, row: Row) -> tuple[RowConfig, int]:
    """Config and rows a program."""
    config = pick(table, arch_of(x), lambda c: c.values >= row.width)
    return config, min(max(power_of_2(config.values // row.width + 1) // 2, 1), power_of_2(x.shape[2]))


def modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """x ``(B, T, S, C)``, shift and scale ``(B, [T, [S,]] C)``, weight and bias ``(C,)`` -> ``(B, T, S, C)``."""
    B, T, S, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    row = split_row(C)
    config, BR = _config(ROWS, x, row)
    norm = Norm(*(None if w is None else w.contiguous() for w in (weight, bias)), eps)
    launch(
        modulate_fwd_kernel,
        B * T * cdiv(S, BR),
        x,
        config,
        *(_rows(x), y, norm, _table(shift), _table(scale), T, S),
        ROW=row,
        BR=BR,
        KIND=KINDS[kind],
        SHIFT_ROWS=shift.ndim == 4,
        SCALE_ROWS=scale.ndim == 4,
    )
    return y


# Partial sums of a backward: enough programs for any GPU, few enough that their sums weigh nothing (1 row in 32).
_CHUNKS_IN_ALL = 1024
_LEAST_ROWS = 32


def _chunks(frames: int, S: int, BR: int) -> tuple[int, int]:
    """Chunks a frame, and rows a chunk: a multiple of BR. From the shape alone, so that sums have one order."""
    chunks = max(min(cdiv(_CHUNKS_IN_ALL, frames), cdiv(S, _LEAST_ROWS)), 1)
    rows = cdiv(cdiv(S, chunks), BR) * BR
    return cdiv(S, rows), rows


def _sum_buffer(x: Tensor, table: Tensor, chunks: int) -> Tensor:
    """Where a table's gradient goes: its rows, or partial sums ``(B, T, chunks, C)``."""
    B, T, _, C = x.shape
    if table.ndim == 4:
        return torch.empty(table.shape, dtype=table.dtype, device=x.device)
    return torch.empty(B, T, chunks, C, dtype=torch.float32, device=x.device)


def _total(found: Tensor, table: Tensor) -> Tensor:
    return found if table.ndim == 4 else found.sum(2) if table.ndim == 3 else found.sum((1, 2))


def modulate_backward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dy: Tensor,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the wanted among x, shift, scale, weight, bias; sums in float32."""
    B, T, S, C = x.shape
    given = {"x": x, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
    tensors = {name: t for name, t in given.items() if name in wanted and t is not None}
    if not x.numel():
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=x.device) for name, t in tensors.items()}
    row = split_row(C)
    config, BR = _config(BACKWARD_ROWS, x, row)
    chunks, rows = _chunks(B * T, S, BR)
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name == "x":
            found[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        elif name in ("shift", "scale"):
            found[name] = _sum_buffer(x, t, chunks)
        else:
            found[name] = torch.empty(B * T * chunks, C, dtype=torch.float32, device=x.device)
    norm = Norm(*(None if w is None else w.contiguous() for w in (weight, bias)), eps)
    # Four sums of wide rows do not fit into registers: those of weight and bias take a pass of their own.
    passes = (("x", "shift", "scale"), ("weight", "bias")) if row.width > _WIDE_SUMS else (tuple(given),)
    for names in passes:
        if not found.keys() & set(names):
            continue
        launch(
            modulate_bwd_kernel,
            B * T * chunks,
            x,
            config,
            *(_rows(x), _rows(dy), norm, _table(scale)),
            *(found.get(name) if name in names else None for name in given),
            *(T, S, rows),
            ROW=row,
            BR=BR,
            KIND=KINDS[kind],
            SHIFT_ROWS=shift.ndim == 4,
            SCALE_ROWS=scale.ndim == 4,
        )
    for name, t in tensors.items():
        if name in ("shift", "scale"):
            found[name] = _total(found[name], t)
        elif name != "x":
            found[name] = found[name].sum(0)
    return found


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual and x ``(B, T, S, C)``, gate ``(B, [T, [S,]] C)`` -> ``residual + gate * x``."""
    B, T, S, C = x.shape
    y = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if not y.numel():
        return y
    row = split_row(C)
    config, BR = _config(ROWS, x, row)
    launch(
        gate_residual_fwd_kernel,
        B * T * cdiv(S, BR),
        x,
        config,
        *(_rows(residual), _rows(x), _table(gate), y, T, S),
        ROW=row,
        BR=BR,
        GATE_ROWS=gate.ndim == 4,
    )
    return y


def gate_residual_backward(x: Tensor, gate: Tensor, dy: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of the wanted among x and gate, which is summed in float32. The residual's is dy itself."""
    B, T, S, C = x.shape
    if not x.numel():
        return {
            name: torch.zeros(t.shape, dtype=t.dtype, device=x.device)
            for name, t in (("x", x), ("gate", gate))
            if name in wanted
        }
    row = split_row(C)
    config, BR = _config(BACKWARD_ROWS, x, row)
    chunks, rows = _chunks(B * T, S, BR)
    found = {"x": torch.empty(x.shape, dtype=x.dtype, device=x.device)} if "x" in wanted else {}
    if "gate" in wanted:
        found["gate"] = _sum_buffer(x, gate, chunks)
    launch(
        gate_residual_bwd_kernel,
        B * T * chunks,
        x,
        config,
        *(_rows(x), _table(gate), _rows(dy), found.get("x"), found.get("gate"), T, S, rows),
        ROW=row,
        BR=BR,
        GATE_ROWS=gate.ndim == 4,
    )
    if "gate" in wanted:
        found["gate"] = _total(found["gate"], gate)
    return found
