"""A gate between two results, of any shape that broadcasts to theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
