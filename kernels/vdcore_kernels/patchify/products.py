"""3D patches: a product that gathers its rows from the video itself, one that scatters into it, and one for the weight.

A row is a token, and its K = channels x patch values lie in the video at offsets that are sums of one number per row
and one per column, so no patches are ever written to memory. K is small (16 to 256) and a token's E channels are many:
what counts is that tokens move once.

    tokens = patches @ weight^T + bias         gather: patchify; unpatchify's gradient of tokens
    patches = tokens @ weight + bias           scatter: unpatchify; patchify's gradient of the video
    weight = sum over tokens of patch x token  the gradient of either weight
"""

from __future__ import annotations

import math
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
def _rows(i, cells, video, tokens, PATCH: tl.constexpr, BM: tl.constexpr):
    """Of BM tokens from i * BM on: where their patches start in the video, where they are themselves, which exist."""
    B, T, H, W = cells
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


@triton.jit(do_not_specialize=["cells"])
def gather_product_kernel(
    video,
    weight,
    p_bias,
    tokens,
    cells,
    E,
    PATCH: tl.constexpr,
    BM: tl.constexpr,  # tokens
    BE: tl.constexpr,  # their channels
    BK: tl.constexpr,  # places of a patch at a time
):
    """One program: BE channels of BM tokens. video: Video, read; tokens: Tokens, written; weight: Matrix; p_bias: (E,),
    or None; cells: B, T', H', W'.
    """
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    columns = tl.cdiv(E, BE)
    o_row, o_token, m_m = _rows(tl.program_id(0) // columns, cells, video, tokens, PATCH, BM)
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
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    if p_bias is not None:
        b_y += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    p_y = tokens.p + (o_token[:, None] + o_e[None, :])
    tl.store(p_y, b_y.to(tokens.p.dtype.element_ty), mask=m_m[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["cells"])
def scatter_product_kernel(
    tokens,
    weight,
    p_bias,
    video,
    cells,
    E,
    PATCH: tl.constexpr,
    BM: tl.constexpr,  # tokens
    BN: tl.constexpr,  # places of a patch
    BE: tl.constexpr,  # channels at a time
):
    """One program: BN places of the patches of BM tokens. tokens: Tokens, read; video: Video, written; weight: Matrix;
    p_bias: one number per place of the patch, with the weight's strides over its number of channels, or None.
    """
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    columns: tl.constexpr = (K + BN - 1) // BN
    o_row, o_token, m_m = _rows(tl.program_id(0) // columns, cells, video, tokens, PATCH, BM)
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
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    if p_bias is not None:
        b_y += tl.load(p_bias + o_weight // E, mask=m_k, other=0.0).to(tl.float32)[None, :]
    p_y = video.p + (o_row[:, None] + o_video[None, :])
    tl.store(p_y, b_y.to(video.p.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["cells", "splits"])
def weight_product_kernel(
    video,
    tokens,
    weight,
    cells,
    E,
    splits,
    size,  # numbers in the weight
    PATCH: tl.constexpr,
    BK: tl.constexpr,  # places of a patch
    BE: tl.constexpr,  # channels
    BM: tl.constexpr,  # tokens at a time
):
    """One program: the sum over every splits-th block of tokens of BK x BE products of patch and token. video, tokens:
    read; weight: Matrix of partial sums (splits, ...), float32.
    """
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
    for i in range(i_split, tl.cdiv(cells[0] * cells[1] * cells[2] * cells[3], BM), splits):
        o_row, o_token, m_m = _rows(i, cells, video, tokens, PATCH, BM)
        b_x = tl.load(video.p + (o_video[:, None] + o_row[None, :]), mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_t = tl.load(tokens.p + (o_token[:, None] + o_e[None, :]), mask=m_m[:, None] & m_e[None, :], other=0.0)
        b_w = tl.dot(b_x, b_t, b_w, input_precision="ieee")
    o_w = i_split.to(tl.int64) * size + o_weight[:, None] + o_e[None, :] * weight.e
    tl.store(weight.p + o_w, b_w, mask=m_k[:, None] & m_e[None, :])


def _matrix(x: Tensor, patch: Patch, order: str, like: Tensor | None = None) -> Matrix:
    """A contiguous weight ``(E, C, pt, ph, pw)`` (order ``""``) or ``(C*pt*ph*pw, E)`` with rows in ``order``."""
    C, pt, ph, pw = patch
    if not order:
        return Matrix(x, pt * ph * pw, ph * pw, pw, 1, C * pt * ph * pw)
    E = (x if like is None else like).shape[1]
    if order == "c pt ph pw":
        return Matrix(x, pt * ph * pw * E, ph * pw * E, pw * E, E, 1)
    return Matrix(x, E, ph * pw * C * E, pw * C * E, C * E, 1)


def _arguments(video: Tensor, tokens: Tensor, patch: Patch, config: PatchConfig) -> tuple[int, dict[str, Any]]:
    """How many tokens there are, and what all three products take by the same names."""
    B, _, T, H, W = video.shape
    grid = (B, T // patch.pt, H // patch.ph, W // patch.pw)
    both = {"video": Video(video, *video.stride()), "tokens": Tokens(tokens, *tokens.stride()[:3])}
    return math.prod(grid), {"config": config, **both, "cells": grid, "E": tokens.shape[-1], "PATCH": patch}


def _pick(table: tuple[PatchConfig, ...], x: Tensor) -> PatchConfig:
    return pick(table, arch_of(x), lambda c: c.size >= x.element_size())


def gather_product(
    video: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, patch: Patch, order: str = ""
) -> None:
    """Fills tokens ``(B, T', H'*W', E)`` from video ``(B, C, T, H, W)``; weight as _matrix takes it, bias ``(E,)``."""
    config = _pick(GATHER, video)
    count, shared = _arguments(video, tokens, patch, config)
    programs = cdiv(count, config.m) * cdiv(tokens.shape[-1], config.n)
    matrix = _matrix(weight.contiguous(), patch, order)
    blocks: dict[str, Any] = {"BM": config.m, "BE": config.n, "BK": config.k}
    launch(gather_product_kernel, programs, like=video, weight=matrix, p_bias=bias, **blocks, **shared)


def scatter_product(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, video: Tensor, patch: Patch, order: str = ""
) -> None:
    """Fills video from tokens; bias: as the weight's rows, with an order only."""
    config = _pick(SCATTER, tokens)
    count, shared = _arguments(video, tokens, patch, config)
    programs = cdiv(count, config.m) * cdiv(math.prod(patch), config.n)
    matrix = _matrix(weight.contiguous(), patch, order)
    blocks: dict[str, Any] = {"BM": config.m, "BN": config.n, "BE": config.k}
    launch(scatter_product_kernel, programs, like=tokens, weight=matrix, p_bias=bias, **blocks, **shared)


def weight_product(video: Tensor, tokens: Tensor, weight: Tensor, patch: Patch, order: str = "") -> Tensor:
    """Gradient of the weight, float32, in its shape: the sum over tokens of patch times token."""
    config = _pick(WEIGHT, video)
    count, shared = _arguments(video, tokens, patch, config)
    tiles = cdiv(math.prod(patch), config.m) * cdiv(tokens.shape[-1], config.n)
    splits = max(min(_PROGRAMS // tiles, cdiv(cdiv(count, config.k), 8)), 1)
    parts = torch.empty(splits, *weight.shape, dtype=torch.float32, device=video.device)
    matrix = _matrix(parts, patch, order, weight)
    blocks: dict[str, Any] = {"BK": config.m, "BE": config.n, "BM": config.k}
    numbers: dict[str, Any] = {"splits": splits, "size": weight.numel()}
    launch(weight_product_kernel, splits * tiles, like=video, weight=matrix, **numbers, **blocks, **shared)
    return parts.sum(0)
