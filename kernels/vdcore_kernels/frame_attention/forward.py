"""Attention of video tokens to the tokens of visible frames and to text: spatial, video and cross attention, forward.

Bound by arithmetic: 4 D FLOP a visible pair. A tile of queries keeps its result in registers and walks through its
runs of keys; q and k come normed and rotated, which is one pass over them beside S passes here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import mask_numbers
from vdcore_kernels.core.launch import Config, arch_of, launch, pick, step
from vdcore_kernels.core.products import power, rows_times, times_rows
from vdcore_kernels.core.tile import filled, keep, scale, split_row, store_rows
from vdcore_kernels.core.tokens import (
    Lengths,
    Mask,
    Sizes,
    left_tile,
    load_tokens,
    near,
    query_tile,
    query_tiles,
    sequence_rows,
    token_rows_of,
    walk,
    whole_tile,
)

LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class FrameConfig(Config):
    """m, n: rows of a tile of queries and of keys; for at most ``channels`` channels of at most ``size`` bytes."""

    m: int = 128
    n: int = 64
    channels: int = 256
    size: int = 2


_FLOAT32 = "float32 is multiplied exactly, on the plain units: small tiles keep its operands in registers"
FORWARD = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 3, "predicted: one warpgroup, 64 keys; two programs an SM hide softmax", 64, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 3, "predicted: two warpgroups of 64 rows share 64 KB of keys a stage", 128, 64, 128),
    FrameConfig("sm_9|sm_10", 8, 2, "predicted: 256 channels: the result takes 128 registers", 128, 64, 256),
    FrameConfig("sm_8", 4, 3, "predicted: 160 KB of shared memory hold three stages of 64 keys", 64, 64, 64),
    FrameConfig("sm_8", 8, 2, "predicted: two stages of 64 keys beside the queries", 128, 64, 128),
    FrameConfig("sm_8", 8, 1, "predicted: one stage of 256 channels", 64, 32, 256),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 64, 32, 128),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 32, 32, 256),
    FrameConfig("", 8, 1, _FLOAT32, 16, 32, 128, 4),
    FrameConfig("", 8, 1, _FLOAT32, 32, 32, 256, 4),
)


@triton.jit
def _attend(
    state,
    b_q,
    k,
    v,
    text_k,
    text_v,
    is_text,
    i_b,
    i_g,
    start,
    stop,
    S,
    exponent,
    BN: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximal score [BM], sum [BM] and result [BM, W] after keys [start, stop) of one tile."""
    b_m, b_l, b_o = state
    m = tl.full([BN], 1, tl.int1) if WHOLE else start + tl.arange(0, BN) < stop
    b_k = load_tokens(k, text_k, is_text, i_b, i_g, start, m, S, BN, A, FLAT, TEXT, ROW)  # [BN, W]
    b_v = load_tokens(v, text_v, is_text, i_b, i_g, start, m, S, BN, A, FLAT, TEXT, ROW)
    b_s = times_rows(b_q, b_k, PRECISION)  # [BM, BN]
    if not WHOLE:
        b_s = tl.where(m[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_p = power(b_s, b_new[:, None], exponent)
    b_c = power(b_m, b_new, exponent)
    b_l = b_l * b_c + tl.sum(b_p, 1)
    b_o = rows_times(b_p.to(b_v[0].dtype), b_v, scale(b_o, b_c[:, None]), PRECISION)
    return b_new, b_l, b_o


@triton.jit(do_not_specialize=["sizes", "mask", "N", "o_video", "o_text", "tiles"])
def frame_attention_fwd_kernel(
    q,  # Rows (B, T, S_q, H, D)
    k,  # Rows (B, T_k, S_k, H/R, D)
    v,
    text_q,  # Rows (B, L, H, D)
    text_k,  # Rows (B, L, H/R, D)
    text_v,
    p_o,  # (B, N, H, D), contiguous: video from row o_video, text from row o_text
    p_lse,  # (B, N, H), or None
    lengths,
    sizes,
    mask,
    N,
    o_video,
    o_text,
    tiles,  # of queries, a sample and head
    exponent,  # scale of the scores times log2 e, above 0
    ROW: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,  # query heads a key/value head
    BM: tl.constexpr,
    BN: tl.constexpr,
    FLAT: tl.constexpr,  # tokens are evenly spaced through all frames
    TEXT: tl.constexpr,
    TEXT_SEES: tl.constexpr,  # text sees the video
    PRECISION: tl.constexpr,
):
    H = sizes.H
    S_q, S_k = sizes.S_q, sizes.S_k
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_g = i_h // R
    # The last frames of a causal mask see the most: they go first, so that no SM is left with one of them at the end.
    i_tile = tiles - 1 - tl.program_id(0) % tiles
    is_text, start, n_rows, n_live, low, begin, end, n_text = query_tile(
        i_tile, lengths, i_b, sizes, mask, BM, TEXT, TEXT_SEES
    )
    m_live = tl.arange(0, BM) < n_live
    b_q = load_tokens(q, text_q, is_text, i_b, i_h, start, m_live, S_q, BM, A, FLAT, TEXT, ROW)  # [BM, W]
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.full([BM], 0.0, tl.float32)
    b_o = filled(BM, 0.0, ROW)
    n_low, n_run, n_txt, n_left = walk(low, begin, end, n_text, BN)
    for i in range(n_low + n_run + n_txt):
        first, of_text = whole_tile(i, n_low, n_run, begin, BN)
        b_m, b_l, b_o = _attend(
            *((b_m, b_l, b_o), b_q, k, v, text_k, text_v, of_text, i_b, i_g, first, first, S_k, exponent),
            *(BN, A, FLAT, TEXT, True, ROW, PRECISION),
        )
    for i in range(n_left):
        first, stop, of_text = left_tile(i, low, begin, end, n_text, BN)
        b_m, b_l, b_o = _attend(
            *((b_m, b_l, b_o), b_q, k, v, text_k, text_v, of_text, i_b, i_g, first, stop, S_k, exponent),
            *(BN, A, FLAT, TEXT, False, ROW, PRECISION),
        )
    m_seeing = m_live & (n_low + n_run + n_txt + n_left > 0)
    b_o = keep(scale(b_o, (1 / b_l)[:, None]), m_seeing[:, None])
    o_n = tl.arange(0, BM)
    m_rows = o_n < n_rows
    row = (i_b * N + tl.where(is_text, o_text, o_video) + start) * H + i_h
    store_rows(p_o + row * ROW.D, o_n * H * ROW.D, m_rows, b_o, ROW)
    if p_lse is not None:
        tl.store(
            p_lse + row + o_n * H, tl.where(m_seeing, b_m * (exponent * LN_2) + tl.log(b_l), -float("inf")), mask=m_rows
        )


def frame_sizes(q: Tensor, k: Tensor, L: int) -> Sizes:
    return Sizes(q.shape[1], k.shape[1], q.shape[2], k.shape[2], L, q.shape[3])


def pick_for(table: tuple[FrameConfig, ...], q: Tensor) -> FrameConfig:
    D, size = q.shape[-1], q.element_size()
    return pick(table, arch_of(q), lambda c: c.channels >= D and c.size >= size)


def base_2(factor: float) -> float:
    """The size of a scale for powers of two. Not quite 0: a maximum of -inf is multiplied by it."""
    return max(abs(factor), 1e-30) / math.log(2)


def frame_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Lengths,
    text_first: bool,
    text_sees: bool,
    factor: float,
) -> None:
    """q ``(B, T, S_q, H, D)``, k and v ``(B, T_k, S_k, G, D)``, text ``(B, L, heads, D)``, all normed and rotated.

    Fills out ``(B, T*S_q + L, H, D)`` and lse ``(B, T*S_q + L, H)``; ``factor``: scale of the scores.
    """
    B, T, S_q, H, D = q.shape
    L = 0 if text is None else text[0].shape[1]
    if factor < 0:
        q, text = -q, None if text is None else (-text[0], *text[1:])
    text = text and tuple(near(x) for x in text)  # type: ignore[assignment]
    numbers, _ = mask_numbers(mask, T, k.shape[1], q_start)
    config = pick_for(FORWARD, q)
    A = step(q, k, v, *(text or ()))
    (rows_q, flat_q), (rows_k, flat_k), (rows_v, flat_v) = (token_rows_of(x, A) for x in (q, k, v))
    tiles = query_tiles(T, S_q, L, q_start, numbers[2], config.m)
    launch(
        frame_attention_fwd_kernel,
        B * H * tiles,
        q,
        config,
        *(rows_q, rows_k, rows_v, *(sequence_rows(x, A) for x in text or (None,) * 3), out, lse, lengths),
        *(frame_sizes(q, k, L), Mask(q_start, *numbers), T * S_q + L),
        *(L if text_first else 0, 0 if text_first else T * S_q, tiles, base_2(factor)),
        ROW=split_row(D),
        A=A,
        R=H // k.shape[3],
        BM=config.m,
        BN=config.n,
        FLAT=flat_q and flat_k and flat_v,
        TEXT=text is not None,
        TEXT_SEES=text_sees,
        PRECISION="ieee",
    )
