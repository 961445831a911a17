"""Tiles of rows in registers: how a row of D channels is split, loaded, normed, rotated and stored.

A row is held as one or two power-of-two tiles, so that 72 channels cost 64 + 16 and not 128. Tile 0 holds the first C0
channels in W0 places, tile 1 the other D - C0 in W1 places (W1 = 0: there is none, and tile 1 is tile 0 again).
With a "half" rotary table channel r turns with channel r + R/2: then tile 0 holds the first and tile 1 the second of
every pair, and turning is elementwise. Places beyond the channels hold 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vdcore.kernels._launch import parts, power_of_2
from vdcore.norm import QKNorm
from vdcore.rope import Rope

KINDS = {"rms": 1, "layer": 2}
STYLES = {"interleaved": 1, "half": 2}


class Split(NamedTuple):
    """How a row is split; the constants that kernels take. R2: rotated pairs, HALF: R2 where tiles have two runs."""

    D: int
    C0: int
    W0: int
    W1: int
    HALF: int

    def constants(self) -> dict[str, int]:
        return {"D": self.D, "C0": self.C0, "W0": self.W0, "W1": self.W1, "HALF": self.HALF}


def split_row(D: int, rope: Rope | None = None) -> Split:
    if rope is not None and rope.style == "half":
        R2 = rope.cos.shape[-1]
        C0 = R2 + (D - 2 * R2 + 1) // 2
        W = max(power_of_2(C0), 16)
        return Split(D, C0, W, W, R2 if 2 * R2 < D else 0)
    first, second = parts(D)
    return Split(D, first if second else D, first, second, 0)


def norm_arguments(norm: QKNorm | None, role: str) -> tuple[tuple, dict[str, int]]:
    """What a kernel takes for the norm of q or of k: ``(p_w, p_b, eps)`` and its constants."""
    if norm is None:
        return (None, None, 0.0), {"KIND": 0, "ALL": 0}
    weight, bias = (norm.q_weight, norm.q_bias) if role == "q" else (norm.k_weight, norm.k_bias)
    tensors = (None if x is None else x.contiguous() for x in (weight, bias))
    return (*tensors, norm.eps), {"KIND": KINDS[norm.kind], "ALL": int(norm.over == "all")}


def rope_arguments(rope: Rope | None) -> tuple[tuple, dict[str, int]]:
    """What a kernel takes for a rotary table: ``(p_cos, p_sin, strides of both over frame, token, head)``, constants."""
    if rope is None:
        return (None, None, 0, 0, 0, 0, 0, 0), {"STYLE": 0, "R2": 0}
    tables = [x if x.ndim == 4 else x.unsqueeze(2) for x in (rope.cos, rope.sin)]
    strides = [s if n > 1 else 0 for x in tables for n, s in zip(x.shape[:3], x.stride()[:3])]
    return (*tables, *strides), {"STYLE": STYLES[rope.style], "R2": rope.cos.shape[-1]}


@triton.jit
def places(W: tl.constexpr, FIRST: tl.constexpr, JUMP: tl.constexpr, HALF: tl.constexpr):
    """Channels of a tile: FIRST + place; JUMP more from place HALF on, where HALF is given."""
    o = tl.arange(0, W)
    if HALF > 0:
        o += tl.where(o < HALF, 0, JUMP)
    return FIRST + o


@triton.jit
def load_rows(
    p, o_row, m_row, D: tl.constexpr, C0: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, HALF: tl.constexpr
):
    """Tiles [..., W0] and [..., W1] of the rows at offsets o_row [...]; 0 where m_row [...] is false."""
    o_row = tl.expand_dims(o_row, -1)
    m_row = tl.expand_dims(m_row, -1)
    m0 = m_row
    if C0 < W0:
        m0 = m_row & (tl.arange(0, W0) < C0)
    x0 = tl.load(p + (o_row + places(W0, 0, HALF, HALF)), mask=m0, other=0.0)
    x1 = x0
    if W1 > 0:
        m1 = m_row
        if D - C0 < W1:
            m1 = m_row & (tl.arange(0, W1) < D - C0)
        # In two runs: places below HALF hold the partners [HALF, 2 HALF), the others follow tile 0's last channel.
        first: tl.constexpr = HALF if HALF > 0 else C0
        x1 = tl.load(p + (o_row + places(W1, first, C0 - HALF, HALF)), mask=m1, other=0.0)
    return x0, x1


@triton.jit
def store_rows(
    p, o_row, m_row, x0, x1, D: tl.constexpr, C0: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, HALF: tl.constexpr
):
    """Stores what load_rows loads, in p's dtype."""
    o_row = tl.expand_dims(o_row, -1)
    m_row = tl.expand_dims(m_row, -1)
    m0 = m_row
    if C0 < W0:
        m0 = m_row & (tl.arange(0, W0) < C0)
    tl.store(p + (o_row + places(W0, 0, HALF, HALF)), x0.to(p.dtype.element_ty), mask=m0)
    if W1 > 0:
        m1 = m_row
        if D - C0 < W1:
            m1 = m_row & (tl.arange(0, W1) < D - C0)
        first: tl.constexpr = HALF if HALF > 0 else C0
        tl.store(p + (o_row + places(W1, first, C0 - HALF, HALF)), x1.to(p.dtype.element_ty), mask=m1)


@triton.jit
def row_sum(x0, x1, W1: tl.constexpr, ALL: tl.constexpr):
    """[..., 1]: sums over channels; with ALL also over axis 0, the heads of one token: [1, 1]."""
    axis: tl.constexpr = len(x0.shape) - 1
    total = tl.sum(x0, axis, keep_dims=True)
    if W1 > 0:
        total += tl.sum(x1, axis, keep_dims=True)
    if ALL:
        total = tl.sum(total, 0, keep_dims=True)
    return total


@triton.jit
def center(x0, x1, mean, m_row, D: tl.constexpr, C0: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Rows minus their mean [..., 1]; places that hold no channel, and rows where m_row [...] is false, stay 0."""
    m_row = tl.expand_dims(m_row, -1)
    x0 = tl.where(m_row & (tl.arange(0, W0) < C0), x0 - mean, 0.0)
    if W1 > 0:
        x1 = tl.where(m_row & (tl.arange(0, W1) < D - C0), x1 - mean, 0.0)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def standardize(
    x0,
    x1,
    m_row,
    count,
    eps,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
):
    """float32 rows over their root mean square (KIND 1) or, centred, over their deviation (2); and 1 over that."""
    if KIND == 2:
        mean = row_sum(x0, x1, W1, ALL) / count
        x0, x1 = center(x0, x1, mean, m_row, D, C0, W0, W1)
    rstd = tl.rsqrt(row_sum(x0 * x0, x1 * x1, W1, ALL) / count + eps)
    return x0 * rstd, x1 * rstd, rstd


@triton.jit
def standardize_backward(
    g0,
    g1,
    h0,
    h1,
    rstd,
    m_row,
    count,
    D: tl.constexpr,
    C0: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
):
    """From the gradient g of standardized rows h to that of the rows."""
    dot = row_sum(g0 * h0, g1 * h1, W1, ALL) / count
    if KIND == 2:
        mean = row_sum(g0, g1, W1, ALL) / count
        g0, g1 = center(g0, g1, mean, m_row, D, C0, W0, W1)
    return (g0 - h0 * dot) * rstd, (g1 - h1 * dot) * rstd


@triton.jit
def load_weight(p, o_row, D: tl.constexpr, C0: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, HALF: tl.constexpr):
    """A norm's weight or bias as float32 tiles, at row offsets o_row [...]."""
    w0, w1 = load_rows(p, o_row, o_row >= 0, D, C0, W0, W1, HALF)
    return w0.to(tl.float32), w1.to(tl.float32)


@triton.jit
def load_angles(
    p, o_row, m_row, REST, C0: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, STYLE: tl.constexpr, R2: tl.constexpr
):
    """float32 table rows for both tiles; pairs and rows that do not turn get REST (1 for cos, 0 for sin)."""
    o_row = tl.expand_dims(o_row, -1)
    m_row = tl.expand_dims(m_row, -1)
    W: tl.constexpr = W0 if STYLE == 2 else W0 // 2
    r = tl.arange(0, W)
    c0 = tl.load(p + (o_row + r), mask=(r < R2) & m_row, other=REST).to(tl.float32)
    c1 = c0
    if STYLE == 1 and W1 > 0:
        r = C0 // 2 + tl.arange(0, W1 // 2)
        c1 = tl.load(p + (o_row + r), mask=(r < R2) & m_row, other=REST).to(tl.float32)
    return c0, c1


@triton.jit
def pairs(x):
    """[..., W] -> the first and the second of neighbours, [..., W/2] each."""
    W: tl.constexpr = x.shape[len(x.shape) - 1]
    if len(x.shape) == 3:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], W // 2, 2)))
    return tl.split(tl.reshape(x, (x.shape[0], W // 2, 2)))


@triton.jit
def turn(x, cos, sin):
    """Neighbours (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = pairs(x)
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def rotate(x0, x1, c0, c1, s0, s1, W1: tl.constexpr, STYLE: tl.constexpr):
    """Both tiles turned; by the negative angle with -sin."""
    if STYLE == 2:
        y0 = x0 * c0 - x1 * s0
        y1 = x1 * c0 + x0 * s0
    else:
        y0 = turn(x0, c0, s0)
        y1 = y0
        if W1 > 0:
            y1 = turn(x1, c1, s1)
    return y0, y1
