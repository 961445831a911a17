"""Tiles of rows in registers: how a row of D channels is split, loaded, normalized, rotated and stored.

A row is held as one or two power-of-two tiles, so that 72 channels cost 64 + 16 and not 128: a tuple ``(x0,)`` or
``(x0, x1)``. Tile 0 holds the first C0 channels in W0 places, tile 1 the other D - C0 in W1 places. With a "half"
rotary table channel r is rotated with channel r + R/2: then tile 0 holds the first and tile 1 the second of every pair,
and rotation is elementwise. Places beyond the channels hold 0. Rows of one tile may come as several blocks of a token's
heads, ``(x0, x1, x2)``: a tile each, of the same channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.norm import KINDS, QKNorm
from vdcore.rope import STYLES, Rope
from vdcore_kernels.core.launch import parts, power_of_2, step, steps

MAX_TOKEN = 8192  # heads times channels, each as wide as its tile, of a norm over all heads
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


class Row(NamedTuple):
    """How a row is split, a constant of kernels. HALF: rotated pairs, where tiles hold two runs of channels each."""

    D: int
    C0: int
    W0: int
    W1: int = 0
    HALF: int = 0

    @property
    def width(self) -> int:
        return self.W0 + self.W1


def split_row(D: int, rope: Rope | None = None) -> Row:
    if rope is not None and rope.style == "half":
        R2 = rope.cos.shape[-1]
        C0 = R2 + (D - 2 * R2 + 1) // 2
        W = max(power_of_2(C0), 16)
        return Row(D, C0, W, W, R2 if 2 * R2 < D else 0)
    first, second = parts(D)
    return Row(D, first if second else D, first, second)


class Rows(NamedTuple):
    """A tensor ``(B, T, S, heads, D)``: its pointer, and its strides in steps of A elements."""

    p: Any
    b: Any
    t: Any
    s: Any
    h: Any


def rows(x: Tensor, A: int) -> Rows:
    return Rows(x, *steps(x, A))


def aligned_rows(*tensors: Tensor) -> tuple[int, list[Rows]]:
    """The step that all tensors' strides share, and each tensor's rows."""
    size = max(x.element_size() for x in tensors)
    A, found = _row_steps(size, *((x.shape, x.stride()) for x in tensors))
    return A, [Rows(x, *of_x) for x, of_x in zip(tensors, found)]


@lru_cache(maxsize=1024)
def _row_steps(size: int, *layouts: tuple[torch.Size, tuple[int, ...]]) -> tuple[int, list[tuple[int, ...]]]:
    dtype = torch.float32 if size == 4 else torch.float16
    like = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride in layouts]
    A = step(*like)
    return A, [steps(x, A) for x in like]


class Norm(NamedTuple):
    """Weight and bias ``(D,)``, or ``(heads*D,)`` over all heads, each or None.

    stats: ``(B, T, S, 2)``, mean and 1 / deviation over all heads, where a kernel holds less than a token; or None.
    """

    w: Any
    b: Any
    eps: Any
    stats: Any = None


def norm_arguments(norm: QKNorm | None, role: str, stats: Tensor | None = None) -> Norm:
    """What a kernel takes for the norm of q or of k."""
    if norm is None:
        return Norm(None, None, 0.0)
    weight, bias = (norm.q_weight, norm.q_bias) if role == "q" else (norm.k_weight, norm.k_bias)
    return Norm(contiguous(weight), contiguous(bias), norm.eps, stats)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class Angles(NamedTuple):
    """Tables of cosines and sines ``(F, S, heads, R/2)``: strides in steps of NormRope.A elements, 0 where they do not
    vary.
    """

    cos: Any
    sin: Any
    cf: Any
    cs: Any
    ch: Any
    sf: Any
    ss: Any
    sh: Any


def rope_arguments(rope: Rope | None) -> Angles:
    """What a kernel takes for a rotary table."""
    if rope is None:
        return Angles(None, None, 0, 0, 0, 0, 0, 0)
    A = step(rope.cos, rope.sin)
    cos, sin = (x if x.ndim == 4 else x.unsqueeze(2) for x in (rope.cos, rope.sin))
    return Angles(cos, sin, *steps(cos, A), *steps(sin, A))


class NormRope(NamedTuple):
    """Which norm and rotary embedding a kernel applies, a constant; 0: none. R2: pairs of channels that are rotated; A:
    elements per step of a table's stride; PER_HEAD: angles vary with the head.
    """

    KIND: int
    ALL: int
    STYLE: int
    R2: int
    A: int
    PER_HEAD: bool


def norm_rope_constants(norm: QKNorm | None, rope: Rope | None) -> NormRope:
    kind, over_all = (KINDS[norm.kind], int(norm.over == "all")) if norm is not None else (0, 0)
    if rope is None:
        return NormRope(kind, over_all, 0, 0, 1, False)
    A = step(rope.cos, rope.sin)
    return NormRope(kind, over_all, STYLES[rope.style], rope.cos.shape[-1], A, rope_per_head(rope))


def rope_per_head(rope: Rope | None) -> bool:
    """Whether angles vary with the head."""
    return rope is not None and rope.cos.ndim == 4 and rope.cos.shape[2] > 1


def norm_fits(heads: int, D: int, norm: QKNorm | None) -> bool:
    """A norm over all heads holds a token in registers; other calls always fit."""
    return norm is None or norm.over != "all" or power_of_2(heads) * power_of_2(D) <= MAX_TOKEN


@triton.jit
def to(x, dtype: tl.constexpr):
    TILES: tl.constexpr = len(x)
    y = x[:0]
    for i in tl.static_range(TILES):
        y += (x[i].to(dtype),)
    return y


@triton.jit
def add(a, b):
    TILES: tl.constexpr = len(a)
    y = a[:0]
    for i in tl.static_range(TILES):
        y += (a[i] + b[i],)
    return y


@triton.jit
def mul(a, b):
    TILES: tl.constexpr = len(a)
    y = a[:0]
    for i in tl.static_range(TILES):
        y += (a[i] * b[i],)
    return y


@triton.jit
def scale(a, by):
    """Every row times its number [..., 1], or all times one."""
    TILES: tl.constexpr = len(a)
    y = a[:0]
    for i in tl.static_range(TILES):
        y += (a[i] * by,)
    return y


@triton.jit
def keep(x, m):
    """x where m, else 0."""
    TILES: tl.constexpr = len(x)
    y = x[:0]
    for i in tl.static_range(TILES):
        y += (tl.where(m, x[i], 0.0),)
    return y


@triton.jit
def materialize_before_dot(x):
    """x, computed where it was loaded.

    The compiler moves elementwise work on a dot's operand behind its change of layout, where warps repeat one another's
    rows and values no longer lie as they were read; a sum over one element is where that stops, and costs nothing.
    """
    if len(x) > 1:
        return _materialize(x[0]), _materialize(x[1])
    else:
        return (_materialize(x[0]),)


@triton.jit
def _materialize(x):
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 1)), 3).to(x.dtype)


@triton.jit
def filled(N: tl.constexpr, value, ROW: tl.constexpr):
    """Tiles [N, W] of one value."""
    if ROW.W1 > 0:
        return tl.full([N, ROW.W0], value, tl.float32), tl.full([N, ROW.W1], value, tl.float32)
    else:
        return (tl.full([N, ROW.W0], value, tl.float32),)


@triton.jit
def zeros(P: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr):
    """Tiles [P, N, W]."""
    if ROW.W1 > 0:
        return tl.full([P, N, ROW.W0], 0.0, tl.float32), tl.full([P, N, ROW.W1], 0.0, tl.float32)
    else:
        return (tl.full([P, N, ROW.W0], 0.0, tl.float32),)


@triton.jit
def column_sum(x):
    """[N, W] -> [1, W]."""
    TILES: tl.constexpr = len(x)
    y = x[:0]
    for i in tl.static_range(TILES):
        y += (tl.sum(x[i], 0, keep_dims=True),)
    return y


@triton.jit
def row_sum(x, ALL: tl.constexpr):
    """[..., 1]: sums over channels; with ALL also over axis 0, the heads of one token: [1, 1]."""
    TILES: tl.constexpr = len(x)
    axis: tl.constexpr = len(x[0].shape) - 1
    if len(x) > 1 and x[1].shape == x[0].shape:
        together = x[0]
        for i in tl.static_range(1, TILES):
            together += x[i]
        total = tl.sum(together, axis, keep_dims=True)
    else:
        total = tl.sum(x[0], axis, keep_dims=True)
        if len(x) > 1:
            total += tl.sum(x[1], axis, keep_dims=True)
    if ALL:
        total = tl.sum(total, 0, keep_dims=True)
    return total


@triton.jit
def _channels_0(ROW: tl.constexpr):
    o = tl.arange(0, ROW.W0)
    if ROW.HALF > 0:
        o += tl.where(o < ROW.HALF, 0, ROW.HALF)
    return o


@triton.jit
def _channels_1(ROW: tl.constexpr):
    # In two runs: places below HALF hold the partners [HALF, 2 HALF), the others follow tile 0's last channel.
    o = tl.arange(0, ROW.W1)
    if ROW.HALF > 0:
        return o + tl.where(o < ROW.HALF, ROW.HALF, ROW.C0)
    else:
        return o + ROW.C0


@triton.jit
def _mask_0(m_row, ROW: tl.constexpr):
    m = tl.expand_dims(m_row, -1)
    if ROW.C0 < ROW.W0:
        m = m & (tl.arange(0, ROW.W0) < ROW.C0)
    return m


@triton.jit
def _mask_1(m_row, ROW: tl.constexpr):
    m = tl.expand_dims(m_row, -1)
    if ROW.D - ROW.C0 < ROW.W1:
        m = m & (tl.arange(0, ROW.W1) < ROW.D - ROW.C0)
    return m


@triton.jit
def load_rows(p, o_row, m_row, ROW: tl.constexpr):
    """Tiles [..., W] of the rows at offsets o_row [...]; 0 where m_row [...] is false."""
    o = tl.expand_dims(o_row, -1)
    x0 = tl.load(p + (o + _channels_0(ROW)), mask=_mask_0(m_row, ROW), other=0.0)
    if ROW.W1 > 0:
        return x0, tl.load(p + (o + _channels_1(ROW)), mask=_mask_1(m_row, ROW), other=0.0)
    else:
        return (x0,)


@triton.jit
def store_rows(p, o_row, m_row, x, ROW: tl.constexpr):
    """Stores what load_rows loads, in p's dtype."""
    o = tl.expand_dims(o_row, -1)
    tl.store(p + (o + _channels_0(ROW)), x[0].to(p.dtype.element_ty), mask=_mask_0(m_row, ROW))
    if ROW.W1 > 0:
        tl.store(p + (o + _channels_1(ROW)), x[1].to(p.dtype.element_ty), mask=_mask_1(m_row, ROW))


@triton.jit
def center(x, mean, m_row, ROW: tl.constexpr):
    """Rows minus their mean [..., 1]; places that hold no channel, and rows where m_row [...] is false, stay 0."""
    TILES: tl.constexpr = len(x)
    if ROW.W1 > 0:
        x0 = tl.where(_mask_0(m_row, ROW), x[0] - mean, 0.0)
        return x0, tl.where(_mask_1(m_row, ROW), x[1] - mean, 0.0)
    else:
        y = x[:0]
        for i in tl.static_range(TILES):
            y += (tl.where(_mask_0(m_row, ROW), x[i] - mean, 0.0),)
        return y


@triton.jit
def standardize(x, m_row, count, eps, ROW: tl.constexpr, KIND: tl.constexpr, ALL: tl.constexpr):
    """float32 rows over their root mean square (KIND 1) or, centered, over their deviation (2); and 1 over that."""
    if KIND == 2:
        x = center(x, row_sum(x, ALL) / count, m_row, ROW)
    rstd = tl.rsqrt(row_sum(mul(x, x), ALL) / count + eps)
    return scale(x, rstd), rstd


@triton.jit
def standardize_backward(g, h, rstd, m_row, count, ROW: tl.constexpr, KIND: tl.constexpr, ALL: tl.constexpr):
    """From the gradient g of standardized rows h to that of the rows."""
    dot = row_sum(mul(g, h), ALL) / count
    if KIND == 2:
        g = center(g, row_sum(g, ALL) / count, m_row, ROW)
    return scale(add(g, scale(h, -dot)), rstd)


@triton.jit
def load_channels(p, ROW: tl.constexpr):
    """One row for all: tiles [W]. Loaded without leading axes, it takes on the layout of what it meets."""
    x0 = tl.load(p + _channels_0(ROW), mask=tl.arange(0, ROW.W0) < ROW.C0, other=0.0)
    if ROW.W1 > 0:
        return x0, tl.load(p + _channels_1(ROW), mask=tl.arange(0, ROW.W1) < ROW.D - ROW.C0, other=0.0)
    else:
        return (x0,)


@triton.jit
def load_weights(p, o_row, m_row, ROW: tl.constexpr, ALL: tl.constexpr):
    """A norm's weight or bias: [..., W] at o_row where m_row with ALL, else [W], one for all rows."""
    if ALL:
        return load_rows(p, o_row, m_row, ROW)
    else:
        return load_channels(p, ROW)


@triton.jit
def load_affine(norm, o_row, m_row, ROW: tl.constexpr, ALL: tl.constexpr):
    """A norm's weight and bias, as load_weights; 0.0 for one that it has not."""
    w, b = 0.0, 0.0
    if norm.w is not None:
        w = load_weights(norm.w, o_row, m_row, ROW, ALL)
    if norm.b is not None:
        b = load_weights(norm.b, o_row, m_row, ROW, ALL)
    return w, b


@triton.jit
def by_weight(x, norm, w):
    """Rows times the norm's weight."""
    if norm.w is not None:
        x = mul(x, to(w, tl.float32))
    return x


@triton.jit
def affine(x, norm, w, b):
    """The same, plus the norm's bias."""
    x = by_weight(x, norm, w)
    if norm.b is not None:
        x = add(x, to(b, tl.float32))
    return x


@triton.jit
def load_angles(p, o_row, m_row, REST, ROW: tl.constexpr, NR: tl.constexpr):
    """float32 table rows at o_row steps; pairs and rows that are not rotated get REST (1 for cos, 0 for sin)."""
    STYLE: tl.constexpr = NR.STYLE
    R2: tl.constexpr = NR.R2
    o = tl.expand_dims(o_row * NR.A, -1)
    m = tl.expand_dims(m_row, -1)
    if STYLE == 2:
        r = tl.arange(0, ROW.W0)
        return (tl.load(p + (o + r), mask=m & (r < R2), other=REST).to(tl.float32),)
    elif ROW.W1 > 0:
        r = tl.arange(0, ROW.W0 // 2)
        r1 = ROW.C0 // 2 + tl.arange(0, ROW.W1 // 2)
        x0 = tl.load(p + (o + r), mask=m & (r < R2), other=REST).to(tl.float32)
        return x0, tl.load(p + (o + r1), mask=m & (r1 < R2), other=REST).to(tl.float32)
    else:
        r = tl.arange(0, ROW.W0 // 2)
        return (tl.load(p + (o + r), mask=m & (r < R2), other=REST).to(tl.float32),)


@triton.jit
def neighbors(x):
    """[..., W] -> the first and the second of every pair, [..., W/2] each."""
    if len(x.shape) == 3:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
    else:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _rotate(x, cos, sin):
    """Neighbors (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = neighbors(x)
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def rotate(x, cos, sin, STYLE: tl.constexpr):
    """Rows rotated; by the negative angle with -sin."""
    TILES: tl.constexpr = len(x)
    if STYLE == 2:
        return x[0] * cos[0] - x[1] * sin[0], x[1] * cos[0] + x[0] * sin[0]
    else:
        y = x[:0]
        for i in tl.static_range(TILES):  # a second tile of channels, or more heads with the same angles
            y += (_rotate(x[i], cos[i % len(cos)], sin[i % len(cos)]),)
        return y
