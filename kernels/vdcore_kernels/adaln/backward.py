"""Adaptive layer norm: modulate and gate_residual, backward.

Bound by memory, as forward. What tokens, frames or samples share gets partial sums per program, added up in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import KINDS
from vdcore_kernels.adaln.forward import SMALL, common_arguments, table_arguments, table_rows
from vdcore_kernels.core.launch import ValuesConfig, cdiv, is_amd, launch
from vdcore_kernels.core.tile import (
    Norm,
    Row,
    add,
    affine,
    by_weight,
    column_sum,
    contiguous,
    filled,
    load_affine,
    mul,
    standardize,
    standardize_backward,
    store_rows,
    to,
)
from vdcore_kernels.core.token_rows import contiguous_rows, frame_block, row_arguments, rows_from, token_rows

_SUMS = (
    "two rows' tiles and up to two sums, 32 values a thread each, do not spill; more warps wait more for one another"
)
BACKWARD_ROWS = (
    SMALL,
    ValuesConfig("", 2, 1, _SUMS, 2048),
    ValuesConfig("", 4, 1, _SUMS, 4096),
    ValuesConfig("", 8, 1, _SUMS, 8192),
)
_WIDE_SUMS = 5120


@triton.jit(do_not_specialize=["T", "S", "rows"])
def modulate_bwd_kernel(
    x,
    dy,
    norm,
    scale,
    p_dx,
    p_dshift,
    p_dscale,
    p_dw,
    p_db,
    T,
    S,
    rows,  # of a chunk, a multiple of BR
    ROW: tl.constexpr,
    BR: tl.constexpr,  # rows at a time
    STAGES: tl.constexpr,  # 2: the next ones are on their way
    KIND: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,  # the shift varies with the token
    SCALE_ROWS: tl.constexpr,
):
    """One program: a chunk of one frame's tokens. x, dy: Rows (B, T, S, C). scale: Rows, strides 0 where it is shared.

    Each None where it is not wanted. p_dx: (B, T, S, C), contiguous. p_dshift, p_dscale, p_dw, p_db: partial sums
    (B*T, chunks, C), float32; p_dshift with SHIFT_ROWS and p_dscale with SCALE_ROWS: rows (B, T, S, C).
    """
    i_b, i_t, first = frame_block(tl.program_id(0), T, S, rows)
    o_w, m_w = tl.arange(0, 1), tl.full([1], 1, tl.int1)
    # n = h w + b and y = n (1 + scale) + shift, with h the standardized row.
    b_dshift = filled(1, 0.0, ROW)
    b_dscale, b_dw, b_db = b_dshift, b_dshift, b_dshift
    for i in tl.range(0, rows, BR, num_stages=STAGES):
        at = rows_from(i_b, i_t, first + i, S, BR)
        _, _, o_s, m_s = at
        b_x = to(token_rows(x, at, ROW), tl.float32)  # [BR, W]
        b_g = to(token_rows(dy, at, ROW), tl.float32)
        b_c = table_rows(scale, at, ROW, SCALE_ROWS)
        b_w, b_b = load_affine(norm, o_s, m_s, ROW, 0)
        b_h, rstd = standardize(b_x, m_s, ROW.D, norm.eps, ROW, KIND, 0)
        o_y = contiguous_rows(at, T, S, ROW)
        if p_dshift is not None:
            if SHIFT_ROWS:
                store_rows(p_dshift, o_y, m_s, b_g, ROW)
            else:
                b_dshift = add(b_dshift, column_sum(b_g))
        if p_dscale is not None:
            b_d = mul(b_g, affine(b_h, norm, b_w, b_b))
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
            b_g = standardize_backward(by_weight(b_g, norm, b_w), b_h, rstd, m_s, ROW.D, ROW, KIND, 0)
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


@triton.jit(do_not_specialize=["T", "S", "rows"])
def gate_residual_bwd_kernel(
    x,
    gate,
    dy,
    p_dx,
    p_dg,
    T,
    S,
    rows,  # of a chunk, a multiple of BR
    ROW: tl.constexpr,
    BR: tl.constexpr,  # rows at a time
    STAGES: tl.constexpr,  # 2: the next ones are on their way
    GATE_ROWS: tl.constexpr,  # the gate varies with the token
):
    """One program: a chunk of one frame's tokens. x, dy: Rows (B, T, S, C). gate: Rows, strides 0 where it is shared.

    p_dx: (B, T, S, C), contiguous, or None. p_dg: partial sums (B*T, chunks, C), float32; with GATE_ROWS rows
    (B, T, S, C); None: not wanted.
    """
    i_b, i_t, first = frame_block(tl.program_id(0), T, S, rows)
    b_sum = filled(1, 0.0, ROW)
    for i in tl.range(0, rows, BR, num_stages=STAGES):
        at = rows_from(i_b, i_t, first + i, S, BR)
        m_s = at[3]
        b_d = token_rows(dy, at, ROW)  # [BR, W]
        o_y = contiguous_rows(at, T, S, ROW)
        b_d = to(b_d, tl.float32)
        if p_dx is not None:
            store_rows(p_dx, o_y, m_s, mul(b_d, table_rows(gate, at, ROW, GATE_ROWS)), ROW)
        if p_dg is not None:
            b_x = token_rows(x, at, ROW)
            b_d = mul(b_d, to(b_x, tl.float32))
            if GATE_ROWS:
                store_rows(p_dg, o_y, m_s, b_d, ROW)
            else:
                b_sum = add(b_sum, column_sum(b_d))
    if p_dg is not None and not GATE_ROWS:
        o_p = tl.program_id(0).to(tl.int64) * ROW.D + tl.arange(0, 1)
        store_rows(p_dg, o_p, o_p >= 0, b_sum, ROW)


# Partial sums of a backward: 4 to 5 waves of a large GPU's programs, and one row of sums to 16 of each tensor.
_CHUNKS_IN_ALL = 2048
_LEAST_ROWS = 16
# Bytes of a tensor's rows that are prefetched: up to seven such pieces fit into 99 KB of shared memory.
_AHEAD = 12_288


def _chunks(frames: int, S: int, BR: int) -> tuple[int, int]:
    """Chunks per frame, and rows per chunk: a multiple of BR. From the shape alone, so that sums have one order."""
    chunks = max(min(cdiv(_CHUNKS_IN_ALL, frames), cdiv(S, _LEAST_ROWS)), 1)
    rows = cdiv(cdiv(S, chunks), BR) * BR
    return cdiv(S, rows), rows


def _stages(x: Tensor, row: Row, BR: int) -> int:
    return 2 if BR * row.width * x.element_size() <= _AHEAD and not is_amd(x) else 1


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
    BR, shared = common_arguments(BACKWARD_ROWS, x)
    chunks, rows = _chunks(B * T, S, BR)
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name == "x":
            found[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        elif name in ("shift", "scale"):
            found[name] = _sum_buffer(x, t, chunks)
        else:
            found[name] = torch.empty(B * T * chunks, C, dtype=torch.float32, device=x.device)
    norm = Norm(contiguous(weight), contiguous(bias), eps)
    # Four sums of wide rows do not fit into registers: those of weight and bias take a pass of their own.
    passes = (("x", "shift", "scale"), ("weight", "bias")) if shared["ROW"].width > _WIDE_SUMS else (tuple(given),)
    for names in passes:
        into = {name: found.get(name) if name in names else None for name in given}
        if all(x is None for x in into.values()):
            continue
        launch(
            modulate_bwd_kernel,
            B * T * chunks,
            dy=row_arguments(dy),
            norm=norm,
            scale=table_arguments(scale),
            p_dx=into["x"],
            p_dshift=into["shift"],
            p_dscale=into["scale"],
            p_dw=into["weight"],
            p_db=into["bias"],
            rows=rows,
            KIND=KINDS[kind],
            SHIFT_ROWS=shift.ndim == 4,
            SCALE_ROWS=scale.ndim == 4,
            STAGES=_stages(x, shared["ROW"], BR),
            **shared,
        )
    for name, t in tensors.items():
        if name in ("shift", "scale"):
            found[name] = _total(found[name], t)
        elif name != "x":
            found[name] = found[name].sum(0)
    return found


def gate_residual_backward(x: Tensor, gate: Tensor, dy: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of the wanted among x and gate, which is summed in float32. The residual's is dy itself."""
    B, T, S, C = x.shape
    if not x.numel():
        return {
            name: torch.zeros(t.shape, dtype=t.dtype, device=x.device)
            for name, t in (("x", x), ("gate", gate))
            if name in wanted
        }
    BR, shared = common_arguments(BACKWARD_ROWS, x)
    chunks, rows = _chunks(B * T, S, BR)
    found = {"x": torch.empty(x.shape, dtype=x.dtype, device=x.device)} if "x" in wanted else {}
    if "gate" in wanted:
        found["gate"] = _sum_buffer(x, gate, chunks)
    launch(
        gate_residual_bwd_kernel,
        B * T * chunks,
        gate=table_arguments(gate),
        dy=row_arguments(dy),
        p_dx=found.get("x"),
        p_dg=found.get("gate"),
        rows=rows,
        GATE_ROWS=gate.ndim == 4,
        STAGES=_stages(x, shared["ROW"], BR),
        **shared,
    )
    if "gate" in wanted:
        found["gate"] = _total(found["gate"], gate)
    return found
