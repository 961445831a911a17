"""A gate between two results, of any shape that broadcasts to theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.tile import load_rows, to


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
def gated(b_o, gate, at, o_t, o_row, m_row, m_gate, ROW: tl.constexpr, GATE_ROWS: tl.constexpr):
    """Rows b_o [BP, BT, W] of sequences at frames o_t, mixed with the rows of the gate's result at o_row [BP, BT]."""
    b_a = to(load_rows(gate.a, o_row * ROW.D, m_row, ROW), tl.float32)
    o_gate = (at.s * gate.s + at.h * gate.h)[:, None] + (o_t.to(tl.int64) * gate.t)[None, :]
    return mix(load_gate(gate.p + at.b * gate.b, o_gate, m_gate, gate.d, ROW, GATE_ROWS), b_a, b_o)
