"""A gate between two results, of any shape that broadcasts to theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.tile import add, load_rows, materialize_before_dot, mul, row_sum, scale, store_rows, to


class Gate(NamedTuple):
    """A gate expanded to ``(B, T, S, H, D)``: its pointer and strides, 0 where it does not vary.

    a: the contiguous result that it weighs; the other one gets what is left.
    """

    p: Any
    a: Any
    b: Any
    t: Any
    s: Any
    h: Any
    d: Any


def gate_arguments(gate: Tensor, a: Tensor) -> Gate:
    """The gate of the result a ``(B, T, S, H, D)``, which it broadcasts to."""
    gate = gate.expand(a.shape)
    return Gate(gate, a, *gate.stride())


@triton.jit
def load_gate(p, o_row, m_row, d, ROW: tl.constexpr, ROWS: tl.constexpr):
    """float32 tiles [..., W] with ROWS, else [..., 1], of rows at offsets o_row [...]; 0 where m_row is false."""
    o = tl.expand_dims(o_row, -1)
    m = tl.expand_dims(m_row, -1)
    if not ROWS:
        b_g = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
        if ROW.W1 > 0:
            return b_g, b_g
        else:
            return (b_g,)
    else:
        c0 = tl.arange(0, ROW.W0)
        g0 = tl.load(p + (o + c0 * d), mask=m & (c0 < ROW.C0), other=0.0).to(tl.float32)
        if ROW.W1 > 0:
            c1 = ROW.C0 + tl.arange(0, ROW.W1)
            return g0, tl.load(p + (o + c1 * d), mask=m & (c1 < ROW.D), other=0.0).to(tl.float32)
        else:
            return (g0,)


@triton.jit
def mix(g, a, b):
    """``g * a + (1 - g) * b``."""
    if len(a) > 1:
        return g[0] * a[0] + (1 - g[0]) * b[0], g[1] * a[1] + (1 - g[1]) * b[1]
    else:
        return (g[0] * a[0] + (1 - g[0]) * b[0],)


@triton.jit
def gate_of(gate, at, o_t, m_row, ROW: tl.constexpr, GATE_ROWS: tl.constexpr):
    """The gate of sequences at frames o_t [BT], float32: [BP, BT, W], or [BP, BT, 1] where channels share it."""
    o_gate = (at.s * gate.s + at.h * gate.h)[:, None] + (o_t.to(tl.int64) * gate.t)[None, :]
    return load_gate(gate.p + at.b * gate.b, o_gate, m_row, gate.d, ROW, GATE_ROWS)


@triton.jit
def load_mixed(gate, at, o_t, o_row, m_row, m_gate, SHAPE: tl.constexpr):
    """Of sequences at frames o_t [BT] the gate, 0 where m_gate is false, and rows of the result a that it weighs, at
    o_row [BP, BT], beside all else that is loaded.
    """
    V: tl.constexpr = SHAPE.V
    GATE_ROWS: tl.constexpr = SHAPE.GATE_ROWS
    b_a = materialize_before_dot(load_rows(gate.a, o_row * V.D, m_row, V))
    return gate_of(gate, at, o_t, m_gate, V, GATE_ROWS), b_a


@triton.jit
def gated(b_o, gate, at, o_t, o_row, m_row, m_gate, ROW: tl.constexpr, GATE_ROWS: tl.constexpr):
    """Rows b_o [BP, BT, W] of sequences at frames o_t, mixed with the rows of the gate's result at o_row [BP, BT]."""
    b_a = to(load_rows(gate.a, o_row * ROW.D, m_row, ROW), tl.float32)
    return mix(gate_of(gate, at, o_t, m_gate, ROW, GATE_ROWS), b_a, b_o)


class Share(NamedTuple):
    """What backward of a mixture of a and b gives beside b's gradients.

    Args:
        a: a's gradient (B, T, S, H, D), contiguous.
        g: the gate's, float32: (B, T, S, H), a number a row; where it varies with the channel (B, T or 1, S, H, D),
            summed over frames that share it; None: not wanted.
    """

    a: Any
    g: Any


@triton.jit
def store_row_gradients(p, b_do, b_a, b_inner, o_row, m_row):
    """A gate's gradient of every row, do (a - b), from b_inner [BP, BT, 1], the inner product of do and b."""
    b_dg = row_sum(mul(to(b_do, tl.float32), to(b_a, tl.float32)), 0) - b_inner
    tl.store(p + o_row[:, :, None], b_dg, mask=m_row[:, :, None])


@triton.jit
def store_channel_gradients(p, b_do, b_a, b_b, o_row, m_row, ROW: tl.constexpr, FRAMES: tl.constexpr):
    """A gate's gradient of every channel, do (a - b), of rows b_b [BP, BT, W]. FRAMES: of every frame, else their sum,
    whose place o_row says for each of them.
    """
    b_dg = mul(to(b_do, tl.float32), add(to(b_a, tl.float32), scale(b_b, -1.0)))
    if FRAMES:
        store_rows(p, o_row * ROW.D, m_row, b_dg, ROW)
    else:
        store_rows(p, tl.min(o_row, 1) * ROW.D, tl.max(m_row.to(tl.int32), 1) > 0, _frame_sum(b_dg), ROW)


@triton.jit
def _frame_sum(x):
    """[BP, BT, W] -> [BP, W]."""
    if len(x) > 1:
        return tl.sum(x[0], 1), tl.sum(x[1], 1)
    else:
        return (tl.sum(x[0], 1),)


@triton.jit
def rest_of(g):
    """``1 - g``."""
    if len(g) > 1:
        return 1 - g[0], 1 - g[1]
    else:
        return (1 - g[0],)
