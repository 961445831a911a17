"""3D patches: a product that gathers its rows from the video itself, one that scatters into it, and one for the weight.

A row is a token, and its K = channels x patch values lie in the video at offsets that are sums of one number a row and
one a column, so no patches are ever written to memory. K is small (16 to 256) and a token's E channels are many: what
counts is that tokens move once.

    tokens = patches @ weight^T + bias         gather: patchify; unpatchify's gradient of tokens
    patches = tokens @ weight + bias           scatter: unpatchify; patchify's gradient of the video
    weight = sum over tokens of patch x token  the gradient of either weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick


@dataclass(frozen=True)
class PatchConfig(Config):
    """m, n: rows and columns of a tile of the result; k: depth of a step; for numbers of at most ``size`` bytes."""

    m: int = 128
    n: int = 64
    k: int = 32
    size: int = 2


_INTERPRETED = PatchConfig("interpreter", 4, 1, "several tiles and steps in a small case", 16, 16, 16, 4)
_FLOAT32 = PatchConfig("", 4, 1, "float32 is multiplied exactly, on the plain units", 32, 32, 16, 4)
GATHER = (
    _INTERPRETED,
    PatchConfig("", 8, 2, "predicted: writing tokens is the cost: 128 channels are full lines", 64, 128, 32),
    _FLOAT32,
)
SCATTER = (
    _INTERPRETED,
    PatchConfig("", 8, 2, "predicted: reading tokens is the cost: 64 columns hold most patches, so once", 64, 64, 64),
    _FLOAT32,
)
WEIGHT = (
    _INTERPRETED,
    PatchConfig("", 4, 2, "predicted: both inputs are read along tokens, 64 at a time", 64, 64, 64),
    _FLOAT32,
)
# Programs that share the tokens of a weight's gradient: enough for any GPU.
_PROGRAMS = 1024


class Video(NamedTuple):
    """``(B, C, T, H, W)`` and its strides."""

    p: Any
    b: Any
    c: Any
    t: Any
    h: Any
    w: Any


class Tokens(NamedTuple):
    """``(B, T', H'*W', E)`` with unit stride in E."""

    p: Any
    b: Any
    t: Any
    s: Any


class Matrix(NamedTuple):
    """The weight: strides of a place in the patch, in C, pt, ph and pw, and of a token's channel."""

    p: Any
    c: Any
    t: Any
    h: Any
    w: Any
    e: Any


class Patch(NamedTuple):
    """Channels and patch sizes, constants."""

    C: int
    pt: int
    ph: int
    pw: int


@triton.jit
def _rows(i, grid, video, tokens, PATCH: tl.constexpr, BM: tl.constexpr):
    """Of BM tokens from i * BM on: where their patches start in the video, where they are themselves, which exist."""
    B, T, H, W = grid
    o_m = i * BM + tl.arange(0, BM)
    m_m = o_m < B * T * H * W
    w = o_m % W
    h = o_m // W % H
    t = o_m // W // H % T
    b = (o_m // W // H // T).to(tl.int64)
    t64, h64 = t.to(tl.int64), h.to(tl.int64)
    o_video = b * video.b + t64 * (PATCH.pt * video.t) + h64 * (PATCH.ph * video.h)
    o_video += w.to(tl.int64) * (PATCH.pw * video.w)
    return o_video, b * tokens.b + t64 * tokens.t + (h64 * W + w) * tokens.s, m_m


@triton.jit
def _columns(k, video, weight, PATCH: tl.constexpr):
    """Of places k in a patch, in the order C, pt, ph, pw: where they are in the video and in the weight."""
    dw = k % PATCH.pw
    dh = k // PATCH.pw % PATCH.ph
    dt = k // (PATCH.pw * PATCH.ph) % PATCH.pt
    c = k // (PATCH.pw * PATCH.ph * PATCH.pt)
    o_video = c.to(tl.int64) * video.c + dt.to(tl.int64) * video.t + dh.to(tl.int64) * video.h
    o_video += dw.to(tl.int64) * video.w
    o_weight = c.to(tl.int64) * weight.c + dt.to(tl.int64) * weight.t
    return o_video, o_weight + dh.to(tl.int64) * weight.h + dw.to(tl.int64) * weight.w


@triton.jit(do_not_specialize=["grid"])
def gather_product_kernel(
    video,
    weight,
    p_bias,  # (E,), or None
    tokens,
    grid,  # B, T', H', W'
    E,
    PATCH: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    columns = tl.cdiv(E, BE)
    o_row, o_token, m_m = _rows(tl.program_id(0) // columns, grid, video, tokens, PATCH, BM)
    o_e = (tl.program_id(0) % columns).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < E
    b_y = tl.zeros([BM, BE], tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        o_video, o_weight = _columns(o_k, video, weight, PATCH)
        m_k = o_k < K
        b_x = tl.load(video.p + (o_row[:, None] + o_video[None, :]), mask=m_m[:, None] & m_k[None, :], other=0.0)
        o_w = o_weight[:, None] + o_e[None, :] * weight.e
        b_w = tl.load(weight.p + o_w, mask=m_k[:, None] & m_e[None, :], other=0.0)  # [BK, BE]
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    p_y = tokens.p + (o_token[:, None] + o_e[None, :])
    tl.store(p_y, b_y.to(tokens.p.dtype.element_ty), mask=m_m[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["grid"])
def scatter_product_kernel(
    tokens,
    weight,
    p_bias,  # one number a place of the patch, with the weight's strides over its number of channels; or None
    video,
    grid,
    E,
    PATCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    columns: tl.constexpr = (K + BN - 1) // BN
    o_row, o_token, m_m = _rows(tl.program_id(0) // columns, grid, video, tokens, PATCH, BM)
    o_k = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    m_k = o_k < K
    o_video, o_weight = _columns(o_k, video, weight, PATCH)
    b_y = tl.zeros([BM, BN], tl.float32)
    for e in range(0, E, BE):
        o_e = (e + tl.arange(0, BE)).to(tl.int64)
        m_e = o_e < E
        b_x = tl.load(tokens.p + (o_token[:, None] + o_e[None, :]), mask=m_m[:, None] & m_e[None, :], other=0.0)
        o_w = o_weight[None, :] + o_e[:, None] * weight.e
        b_w = tl.load(weight.p + o_w, mask=m_e[:, None] & m_k[None, :], other=0.0)  # [BE, BN]
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_weight // E, mask=m_k, other=0.0).to(tl.float32)[None, :]
    p_y = video.p + (o_row[:, None] + o_video[None, :])
    tl.store(p_y, b_y.to(video.p.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["grid", "splits"])
def weight_product_kernel(
    video,
    tokens,
    weight,  # partial sums (splits, ...), float32
    grid,
    E,
    splits,
    size,  # numbers in the weight
    PATCH: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    rows: tl.constexpr = (K + BK - 1) // BK
    columns = tl.cdiv(E, BE)
    i_split = tl.program_id(0) // (rows * columns)
    i_tile = tl.program_id(0) % (rows * columns)
    o_k = i_tile // columns * BK + tl.arange(0, BK)
    o_e = (i_tile % columns).to(tl.int64) * BE + tl.arange(0, BE)
    m_k = o_k < K
    m_e = o_e < E
    o_video, o_weight = _columns(o_k, video, weight, PATCH)
    b_w = tl.zeros([BK, BE], tl.float32)
    for i in range(i_split, tl.cdiv(grid[0] * grid[1] * grid[2] * grid[3], BM), splits):
        o_row, o_token, m_m = _rows(i, grid, video, tokens, PATCH, BM)
        b_x = tl.load(video.p + (o_video[:, None] + o_row[None, :]), mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_t = tl.load(tokens.p + (o_token[:, None] + o_e[None, :]), mask=m_m[:, None] & m_e[None, :], other=0.0)
        b_w = tl.dot(b_x, b_t, b_w, input_precision=PRECISION)
    o_w = i_split.to(tl.int64) * size + o_weight[:, None] + o_e[None, :] * weight.e
    tl.store(weight.p + o_w, b_w, mask=m_k[:, None] & m_e[None, :])


# ---- Launch ----


def _video(x: Tensor) -> Video:
    return Video(x, *x.stride())


def _tokens(x: Tensor) -> Tokens:
    return Tokens(x, *x.stride()[:3])


def _matrix(x: Tensor, patch: Patch, order: str, like: Tensor | None = None) -> Matrix:
    """A contiguous weight ``(E, C, pt, ph, pw)`` (order ``""``) or ``(C*pt*ph*pw, E)`` with rows in ``order``."""
    C, pt, ph, pw = patch
    if not order:
        return Matrix(x, pt * ph * pw, ph * pw, pw, 1, C * pt * ph * pw)
    E = (x if like is None else like).shape[1]
    if order == "c pt ph pw":
        return Matrix(x, pt * ph * pw * E, ph * pw * E, pw * E, E, 1)
    return Matrix(x, E, ph * pw * C * E, pw * C * E, C * E, 1)


def _grid(video: Tensor, patch: Patch) -> tuple[int, int, int, int]:
    B, _, T, H, W = video.shape
    return B, T // patch.pt, H // patch.ph, W // patch.pw


def _pick(table: tuple[PatchConfig, ...], x: Tensor) -> PatchConfig:
    return pick(table, arch_of(x), lambda c: c.size >= x.element_size())


def gather_product(
    video: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, patch: Patch, order: str = ""
) -> None:
    """Fills tokens ``(B, T', H'*W', E)`` from video ``(B, C, T, H, W)``; weight as _matrix takes it, bias ``(E,)``."""
    config = _pick(GATHER, video)
    grid = _grid(video, patch)
    E = tokens.shape[-1]
    launch(
        gather_product_kernel,
        cdiv(grid[0] * grid[1] * grid[2] * grid[3], config.m) * cdiv(E, config.n),
        video,
        config,
        *(_video(video), _matrix(weight.contiguous(), patch, order), bias, _tokens(tokens), grid, E),
        PATCH=patch,
        BM=config.m,
        BE=config.n,
        BK=config.k,
        PRECISION="ieee",
    )


def scatter_product(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, video: Tensor, patch: Patch, order: str = ""
) -> None:
    """Fills video from tokens; bias: as the weight's rows, with an order only."""
    config = _pick(SCATTER, tokens)
    grid = _grid(video, patch)
    E = tokens.shape[-1]
    launch(
        scatter_product_kernel,
        cdiv(grid[0] * grid[1] * grid[2] * grid[3], config.m)
        * cdiv(patch.C * patch.pt * patch.ph * patch.pw, config.n),
        tokens,
        config,
        *(_tokens(tokens), _matrix(weight.contiguous(), patch, order), bias, _video(video), grid, E),
        PATCH=patch,
        BM=config.m,
        BN=config.n,
        BE=config.k,
        PRECISION="ieee",
    )


def weight_product(video: Tensor, tokens: Tensor, weight: Tensor, patch: Patch, order: str = "") -> Tensor:
    """Gradient of the weight, float32, in its shape: the sum over tokens of patch times token."""
    config = _pick(WEIGHT, video)
    grid = _grid(video, patch)
    E = tokens.shape[-1]
    tiles = cdiv(patch.C * patch.pt * patch.ph * patch.pw, config.m) * cdiv(E, config.n)
    blocks = cdiv(grid[0] * grid[1] * grid[2] * grid[3], config.k)
    splits = max(min(_PROGRAMS // tiles, cdiv(blocks, 8)), 1)
    parts = torch.empty(splits, *weight.shape, dtype=torch.float32, device=video.device)
    launch(
        weight_product_kernel,
        splits * tiles,
        video,
        config,
        *(_video(video), _tokens(tokens), _matrix(parts, patch, order, weight), grid, E, splits, weight.numel()),
        PATCH=patch,
        BK=config.m,
        BE=config.n,
        BM=config.k,
        PRECISION="ieee",
    )
    return parts.sum(0)
