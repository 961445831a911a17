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

from vdcore.kernels._launch import Config, arch_of, cdiv, launch, pick, power_of_2
from vdcore.kernels._tile import (
    KINDS,
    Split,
    load_rows,
    load_weight,
    split_row,
    standardize,
    standardize_backward,
    store_rows,
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
    RowConfig("interpreter", 4, 1, "two rows of a small case, so that tiles of rows are exercised", 256),
    RowConfig("", 1, 1, _WARP, 2560),
    RowConfig("", 2, 1, _WIDE, 4096),
    RowConfig("", 4, 1, _WIDE, 8192),
    RowConfig("", 8, 1, _WIDE, 16384),
)
BACKWARD_ROWS = (
    RowConfig("interpreter", 4, 1, "two rows of a small case, so that tiles of rows are exercised", 256),
    RowConfig("", 2, 1, _SUMS, 1280),
    RowConfig("", 4, 1, _SUMS, 2560),
    RowConfig("", 8, 1, _SUMS, 5120),
    RowConfig("", 16, 1, _SUMS, 10240),
    RowConfig("", 32, 1, _SUMS, 16384),
)
MAX_CHANNELS = 16384


@dataclass(frozen=True)
class Table:
    """A shift, scale or gate: ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)``, and how rows find theirs."""

    x: Tensor
    strides: tuple[int, int, int]
    per_token: int

    @staticmethod
    def of(x: Tensor) -> Table:
        s = x.stride()
        strides = (s[0], s[1] if x.ndim > 2 else 0, s[2] if x.ndim > 3 else 0)
        return Table(x, strides, int(x.ndim == 4))


def _rows(config: RowConfig, split: Split) -> int:
    return max(power_of_2(config.values // (split.W0 + split.W1) + 1) // 2, 1)


@triton.jit
def modulate_fwd_kernel(
    p_x,  # (B, T, S, C)
    p_y,  # (B, T, S, C), contiguous
    p_w,  # (C,) or None
    p_b,
    p_shift,
    p_scale,
    s_xb,
    s_xt,
    s_xs,
    s_fb,  # of shift over samples, frames, tokens; 0 where it does not vary
    s_ft,
    s_fs,
    s_cb,  # of scale
    s_ct,
    s_cs,
    T,
    S,
    eps,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    BR: tl.constexpr,  # rows
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    blocks = tl.cdiv(S, BR)
    i_bt = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    o_s = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_s = o_s < S
    o_s = o_s.to(tl.int64)

    x0, x1 = load_rows(p_x + i_b * s_xb + i_t * s_xt, o_s * s_xs, m_s, D, C0, W0, W1, HALF)  # [BR, W]
    o_f = (o_s if SHIFT_ROWS else tl.arange(0, 1)) * s_fs
    o_c = (o_s if SCALE_ROWS else tl.arange(0, 1)) * s_cs
    m_f = m_s if SHIFT_ROWS else tl.arange(0, 1) < 1
    m_c = m_s if SCALE_ROWS else tl.arange(0, 1) < 1
    f0, f1 = load_rows(p_shift + i_b * s_fb + i_t * s_ft, o_f, m_f, D, C0, W0, W1, HALF)  # [BR or 1, W]
    c0, c1 = load_rows(p_scale + i_b * s_cb + i_t * s_ct, o_c, m_c, D, C0, W0, W1, HALF)

    y0, y1, _ = standardize(x0.to(tl.float32), x1.to(tl.float32), m_s, D, eps, D, C0, W0, W1, KIND, 0)
    if p_w is not None:
        w0, w1 = load_weight(p_w, tl.arange(0, 1), D, C0, W0, W1, HALF)
        y0 *= w0
        y1 *= w1
    if p_b is not None:
        b0, b1 = load_weight(p_b, tl.arange(0, 1), D, C0, W0, W1, HALF)
        y0 += b0
        y1 += b1
    y0 = y0 * (1 + c0.to(tl.float32)) + f0.to(tl.float32)
    y1 = y1 * (1 + c1.to(tl.float32)) + f1.to(tl.float32)
    store_rows(p_y + i_bt * S * D, o_s * D, m_s, y0, y1, D, C0, W0, W1, HALF)


@triton.jit
def modulate_bwd_kernel(
    p_x,
    p_dy,
    p_w,
    p_b,
    p_scale,
    p_dx,  # (B, T, S, C), contiguous
    p_dshift,  # partial sums (B*T, chunks, C), float32; rows (B, T, S, C) with SHIFT_ROWS; None: not wanted
    p_dscale,
    p_dw,  # partial sums (B*T, chunks, C), float32, or None
    p_db,
    s_xb,
    s_xt,
    s_xs,
    s_yb,
    s_yt,
    s_ys,
    s_cb,
    s_ct,
    s_cs,
    T,
    S,
    chunks,
    rows,  # of a chunk, a multiple of BR
    eps,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    BR: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    i_bt = (tl.program_id(0) // chunks).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    first = (tl.program_id(0) % chunks) * rows
    # n = h w + b, y = n (1 + scale) + shift, with h the standardized row.
    w0 = tl.full([1, W0], 1.0, tl.float32)
    w1 = tl.full([1, W1 if W1 > 0 else W0], 1.0, tl.float32)
    if p_w is not None:
        w0, w1 = load_weight(p_w, tl.arange(0, 1), D, C0, W0, W1, HALF)
    b0, b1 = w0 * 0, w1 * 0
    if p_b is not None:
        b0, b1 = load_weight(p_b, tl.arange(0, 1), D, C0, W0, W1, HALF)
    f0, f1 = w0 * 0, w1 * 0  # sums of shift, scale, weight and bias, [1, W]
    c0, c1 = f0, f1
    dw0, dw1 = f0, f1
    db0, db1 = f0, f1
    for i in range(0, rows, BR):
        o_s = first + i + tl.arange(0, BR)
        m_s = o_s < S
        o_s = o_s.to(tl.int64)
        x0, x1 = load_rows(p_x + i_b * s_xb + i_t * s_xt, o_s * s_xs, m_s, D, C0, W0, W1, HALF)  # [BR, W]
        g0, g1 = load_rows(p_dy + i_b * s_yb + i_t * s_yt, o_s * s_ys, m_s, D, C0, W0, W1, HALF)
        o_c = (o_s if SCALE_ROWS else tl.arange(0, 1)) * s_cs
        m_c = m_s if SCALE_ROWS else tl.arange(0, 1) < 1
        a0, a1 = load_rows(p_scale + i_b * s_cb + i_t * s_ct, o_c, m_c, D, C0, W0, W1, HALF)
        h0, h1, rstd = standardize(x0.to(tl.float32), x1.to(tl.float32), m_s, D, eps, D, C0, W0, W1, KIND, 0)
        g0, g1 = g0.to(tl.float32), g1.to(tl.float32)
        o_y = i_bt * S * D + o_s * D
        if p_dshift is not None:
            if SHIFT_ROWS:
                store_rows(p_dshift, o_y, m_s, g0, g1, D, C0, W0, W1, HALF)
            else:
                f0 += tl.sum(g0, 0, keep_dims=True)
                f1 += tl.sum(g1, 0, keep_dims=True)
        if p_dscale is not None:
            d0, d1 = g0 * (h0 * w0 + b0), g1 * (h1 * w1 + b1)
            if SCALE_ROWS:
                store_rows(p_dscale, o_y, m_s, d0, d1, D, C0, W0, W1, HALF)
            else:
                c0 += tl.sum(d0, 0, keep_dims=True)
                c1 += tl.sum(d1, 0, keep_dims=True)
        g0 *= 1 + a0.to(tl.float32)
        g1 *= 1 + a1.to(tl.float32)
        if p_dw is not None:
            dw0 += tl.sum(g0 * h0, 0, keep_dims=True)
            dw1 += tl.sum(g1 * h1, 0, keep_dims=True)
        if p_db is not None:
            db0 += tl.sum(g0, 0, keep_dims=True)
            db1 += tl.sum(g1, 0, keep_dims=True)
        if p_dx is not None:
            x0, x1 = standardize_backward(g0 * w0, g1 * w1, h0, h1, rstd, m_s, D, D, C0, W0, W1, KIND, 0)
            store_rows(p_dx, o_y, m_s, x0, x1, D, C0, W0, W1, HALF)
    o_p = tl.program_id(0).to(tl.int64) * D + tl.arange(0, 1)
    m_p = o_p >= 0
    if p_dshift is not None and not SHIFT_ROWS:
        store_rows(p_dshift, o_p, m_p, f0, f1, D, C0, W0, W1, HALF)
    if p_dscale is not None and not SCALE_ROWS:
        store_rows(p_dscale, o_p, m_p, c0, c1, D, C0, W0, W1, HALF)
    if p_dw is not None:
        store_rows(p_dw, o_p, m_p, dw0, dw1, D, C0, W0, W1, HALF)
    if p_db is not None:
        store_rows(p_db, o_p, m_p, db0, db1, D, C0, W0, W1, HALF)


@triton.jit
def gate_residual_fwd_kernel(
    p_r,  # (B, T, S, C)
    p_x,
    p_g,
    p_y,  # (B, T, S, C), contiguous
    s_rb,
    s_rt,
    s_rs,
    s_xb,
    s_xt,
    s_xs,
    s_gb,
    s_gt,
    s_gs,
    T,
    S,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    BR: tl.constexpr,
    GATE_ROWS: tl.constexpr,
):
    blocks = tl.cdiv(S, BR)
    i_bt = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    o_s = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    m_s = o_s < S
    o_s = o_s.to(tl.int64)
    r0, r1 = load_rows(p_r + i_b * s_rb + i_t * s_rt, o_s * s_rs, m_s, D, C0, W0, W1, HALF)  # [BR, W]
    x0, x1 = load_rows(p_x + i_b * s_xb + i_t * s_xt, o_s * s_xs, m_s, D, C0, W0, W1, HALF)
    o_g = (o_s if GATE_ROWS else tl.arange(0, 1)) * s_gs
    m_g = m_s if GATE_ROWS else tl.arange(0, 1) < 1
    g0, g1 = load_rows(p_g + i_b * s_gb + i_t * s_gt, o_g, m_g, D, C0, W0, W1, HALF)  # [BR or 1, W]
    y0 = r0.to(tl.float32) + g0.to(tl.float32) * x0.to(tl.float32)
    y1 = r1.to(tl.float32) + g1.to(tl.float32) * x1.to(tl.float32)
    store_rows(p_y + i_bt * S * D, o_s * D, m_s, y0, y1, D, C0, W0, W1, HALF)


@triton.jit
def gate_residual_bwd_kernel(
    p_x,
    p_g,
    p_dy,
    p_dr,  # (B, T, S, C), contiguous, or None
    p_dx,
    p_dg,  # partial sums (B*T, chunks, C), float32; rows (B, T, S, C) with GATE_ROWS; None: not wanted
    s_xb,
    s_xt,
    s_xs,
    s_gb,
    s_gt,
    s_gs,
    s_yb,
    s_yt,
    s_ys,
    T,
    S,
    chunks,
    rows,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    HALF: tl.constexpr,
    BR: tl.constexpr,
    GATE_ROWS: tl.constexpr,
):
    i_bt = (tl.program_id(0) // chunks).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    first = (tl.program_id(0) % chunks) * rows
    sum0 = tl.zeros([1, W0], tl.float32)
    sum1 = tl.zeros([1, W1 if W1 > 0 else W0], tl.float32)
    for i in range(0, rows, BR):
        o_s = first + i + tl.arange(0, BR)
        m_s = o_s < S
        o_s = o_s.to(tl.int64)
        d0, d1 = load_rows(p_dy + i_b * s_yb + i_t * s_yt, o_s * s_ys, m_s, D, C0, W0, W1, HALF)  # [BR, W]
        o_y = i_bt * S * D + o_s * D
        if p_dr is not None:
            store_rows(p_dr, o_y, m_s, d0, d1, D, C0, W0, W1, HALF)
        d0, d1 = d0.to(tl.float32), d1.to(tl.float32)
        if p_dx is not None:
            o_g = (o_s if GATE_ROWS else tl.arange(0, 1)) * s_gs
            m_g = m_s if GATE_ROWS else tl.arange(0, 1) < 1
            g0, g1 = load_rows(p_g + i_b * s_gb + i_t * s_gt, o_g, m_g, D, C0, W0, W1, HALF)
            store_rows(p_dx, o_y, m_s, g0.to(tl.float32) * d0, g1.to(tl.float32) * d1, D, C0, W0, W1, HALF)
        if p_dg is not None:
            x0, x1 = load_rows(p_x + i_b * s_xb + i_t * s_xt, o_s * s_xs, m_s, D, C0, W0, W1, HALF)
            x0, x1 = x0.to(tl.float32) * d0, x1.to(tl.float32) * d1
            if GATE_ROWS:
                store_rows(p_dg, o_y, m_s, x0, x1, D, C0, W0, W1, HALF)
            else:
                sum0 += tl.sum(x0, 0, keep_dims=True)
                sum1 += tl.sum(x1, 0, keep_dims=True)
    if p_dg is not None and not GATE_ROWS:
        o_p = tl.program_id(0).to(tl.int64) * D + tl.arange(0, 1)
        store_rows(p_dg, o_p, o_p >= 0, sum0, sum1, D, C0, W0, W1, HALF)


def modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """x ``(B, T, S, C)``, shift and scale ``(B, [T, [S,]] C)``, weight and bias ``(C,)`` -> ``(B, T, S, C)``."""
    B, T, S, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    split, f, c = split_row(C), Table.of(shift), Table.of(scale)
    config = pick(ROWS, arch_of(x), lambda row: row.values >= split.W0 + split.W1)
    BR = min(_rows(config, split), power_of_2(S))
    weights = [None if w is None else w.contiguous() for w in (weight, bias)]
    launch(
        modulate_fwd_kernel,
        B * T * cdiv(S, BR),
        x,
        config,
        *(x, y, *weights, shift, scale, *x.stride()[:3], *f.strides, *c.strides, T, S, eps),
        **split.constants(),
        BR=BR,
        KIND=KINDS[kind],
        SHIFT_ROWS=f.per_token,
        SCALE_ROWS=c.per_token,
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
    split, f, c = split_row(C), Table.of(shift), Table.of(scale)
    config = pick(BACKWARD_ROWS, arch_of(x), lambda row: row.values >= split.W0 + split.W1)
    BR = min(_rows(config, split), power_of_2(S))
    chunks, rows = _chunks(B * T, S, BR)
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name == "x":
            found[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        elif name in ("shift", "scale"):
            found[name] = _sum_buffer(x, t, chunks)
        else:
            found[name] = torch.empty(B * T * chunks, C, dtype=torch.float32, device=x.device)
    weights = [None if w is None else w.contiguous() for w in (weight, bias)]
    launch(
        modulate_bwd_kernel,
        B * T * chunks,
        x,
        config,
        *(x, dy, *weights, scale, *(found.get(name) for name in given)),
        *(*x.stride()[:3], *dy.stride()[:3], *c.strides, T, S, chunks, rows, eps),
        **split.constants(),
        BR=BR,
        KIND=KINDS[kind],
        SHIFT_ROWS=f.per_token,
        SCALE_ROWS=c.per_token,
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
    split, g = split_row(C), Table.of(gate)
    config = pick(ROWS, arch_of(x), lambda row: row.values >= split.W0 + split.W1)
    BR = min(_rows(config, split), power_of_2(S))
    launch(
        gate_residual_fwd_kernel,
        B * T * cdiv(S, BR),
        x,
        config,
        *(residual, x, gate, y, *residual.stride()[:3], *x.stride()[:3], *g.strides, T, S),
        **split.constants(),
        BR=BR,
        GATE_ROWS=g.per_token,
    )
    return y


def gate_residual_backward(x: Tensor, gate: Tensor, dy: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of the wanted among residual, x, gate; the gate's is summed in float32."""
    B, T, S, C = x.shape
    if not x.numel():
        shapes = {"residual": x, "x": x, "gate": gate}
        return {name: torch.zeros(shapes[name].shape, dtype=shapes[name].dtype, device=x.device) for name in wanted}
    split, g = split_row(C), Table.of(gate)
    config = pick(BACKWARD_ROWS, arch_of(x), lambda row: row.values >= split.W0 + split.W1)
    BR = min(_rows(config, split), power_of_2(S))
    chunks, rows = _chunks(B * T, S, BR)
    found = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name in ("residual", "x") if name in wanted}
    if "gate" in wanted:
        found["gate"] = _sum_buffer(x, gate, chunks)
    launch(
        gate_residual_bwd_kernel,
        B * T * chunks,
        x,
        config,
        *(x, gate, dy, *(found.get(name) for name in ("residual", "x", "gate"))),
        *(*x.stride()[:3], *g.strides, *dy.stride()[:3], T, S, chunks, rows),
        **split.constants(),
        BR=BR,
        GATE_ROWS=g.per_token,
    )
    if "gate" in wanted:
        found["gate"] = _total(found["gate"], gate)
    return found
