"""Attention of video tokens to the tokens of visible frames and to text: spatial, video and cross attention, forward.

Bound by arithmetic: 4 D FLOP per visible pair. A tile of queries keeps its result in registers and walks through its
runs of keys; q and k come normalized and rotated, which is one pass over them beside S passes here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import Frames, frame_bounds
from vdcore_kernels.core.launch import Config, arch_of, launch, pick, step
from vdcore_kernels.core.tile import LN_2, filled, keep, scale, split_row, store_rows
from vdcore_kernels.core.tokens import (
    At,
    Lengths,
    Sizes,
    Tile,
    amd_alignment,
    is_flat,
    left_tile,
    load_keys,
    load_tokens,
    near,
    power,
    query_tile,
    query_tiles,
    result_token,
    rows_times,
    times_rows,
    token_pair,
    walk,
    whole_tile,
)

Triple = tuple[Tensor, Tensor, Tensor]
Text = Triple | tuple[None, None, None]
NO_TEXT = (None, None, None)


@dataclass(frozen=True)
class FrameConfig(Config):
    """m, n: rows of a tile of queries and of keys; for at most ``channels`` channels of at most ``size`` bytes."""

    m: int = 128
    n: int = 64
    channels: int = 256
    size: int = 2


# Warps that multiply as warps, not as a warpgroup, hold 16 rows each: eight of them share 128, and 64 rows twice.
SMALL = "sm_8|sm_11|sm_12"
_OTHERS = "sm_86|sm_87|sm_89|sm_11|sm_12"
# Not as three products of tf32 (tf32x3): a tensor core cuts its sums toward zero, and a model of that errs by up to 0.8
# of what the tolerance rule allows at 64 channels and 1.2 at 128 (tests/ops/test_tf32x3.py), plain units by 0.4.
FLOAT32 = "float32 is multiplied exactly, on the plain units: small tiles keep its operands in registers"
FORWARD = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 8, 3, "128 queries: half the L2's traffic of 64", 128, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 3, "two warpgroups of 64 rows share 64 KB of keys per stage", 128, 64, 128),
    FrameConfig("sm_9|sm_10", 8, 2, "256 channels: the result takes 128 registers; 64 keys spill", 128, 32, 256),
    FrameConfig("sm_80", 4, 2, "two tiles of 40 channels: three stages spill", 128, 64, 48),
    FrameConfig(
        "sm_80", 4, 3, "128 queries: half the L2's traffic of 64, 5.2 instructions a product for 6.1", 128, 64, 64
    ),
    FrameConfig("sm_80", 8, 3, "half the L2's traffic of 64, 5.4 instructions for 7.6; 64 keys spill", 128, 32, 128),
    FrameConfig(_OTHERS, 4, 3, "48 KB of shared memory: two programs", 64, 64, 64),
    FrameConfig(_OTHERS, 4, 2, "57 KB of shared memory; 64 keys spill", 64, 32, 128),
    FrameConfig(SMALL, 8, 1, "128 queries: half the products of 64 over eight warps", 128, 32, 160),
    FrameConfig(SMALL, 8, 1, "one stage of 256 channels; 128 queries spill", 64, 32, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 64, 32, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 256, 4, registers=255),
)


@triton.jit
def _attend(state, b_q, k, v, at, stop, S, exponent, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Maximal score [BM], sum [BM] and result [BM, W] after keys [at.start, stop) of one tile."""
    b_m, b_l, b_o = state
    b_k, b_v, m = load_keys(k, v, at, stop, S, WHOLE, TILE)  # [BN, W]
    b_s = times_rows(b_q, b_k)  # [BM, BN]
    if not WHOLE:
        b_s = tl.where(m[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_p = power(b_s, b_new[:, None], exponent)
    b_c = power(b_m, b_new, exponent)
    b_l = b_l * b_c + tl.sum(b_p, 1)
    b_o = rows_times(b_p.to(b_v[0].dtype), b_v, scale(b_o, b_c[:, None]))
    return b_new, b_l, b_o


@triton.jit(do_not_specialize=[*Sizes._fields, *Frames._fields, "tiles"])
def frame_attention_fwd_kernel(
    q,
    k,
    v,
    p_o,
    p_lse,
    lengths,
    S_q,
    S_k,
    L,
    H,
    T,
    T_k,
    q_start,
    past,
    future,
    chunk,
    sink,
    group,
    clean,
    shots,
    tiles,
    exponent,
    TILE: tl.constexpr,
):
    """One program: a tile of BM queries (video or text tokens) of one sample and head, and all keys that they see.

    q: Pair (B, T, S_q, H, D) and (B, L, H, D). k, v: Pair (B, T_k, S_k, H/R, D) and (B, L, H/R, D). p_o: (B, N, H, D),
    contiguous, its rows where result_token says. p_lse: (B, N, H), or None. tiles: of queries, per sample and head.
    exponent: size of the scale of the scores, times log2 e, above 0.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    ROW: tl.constexpr = TILE.ROW
    sizes, frames = Sizes(S_q, S_k, L, H), Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    at, n_rows, n_live, runs = query_tile(tiles, lengths, sizes, frames, TILE)
    i_g = at.h // TILE.R
    m_live = tl.arange(0, BM) < n_live
    b_q = load_tokens(q, at, m_live, S_q, BM, TILE)  # [BM, W]
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.full([BM], 0.0, tl.float32)
    b_o = filled(BM, 0.0, ROW)
    n_low, n_run, n_txt, n_left = walk(runs, BN)
    for i in range(n_low + n_run + n_txt):
        is_text, first = whole_tile(i, n_low, n_run, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_m, b_l, b_o = _attend((b_m, b_l, b_o), b_q, k, v, at_k, first, S_k, exponent, WHOLE=True, TILE=TILE)
    for i in tl.range(n_left, num_stages=1):
        is_text, first, stop = left_tile(i, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_m, b_l, b_o = _attend((b_m, b_l, b_o), b_q, k, v, at_k, stop, S_k, exponent, WHOLE=False, TILE=TILE)
    m_seeing = m_live & (n_low + n_run + n_txt + n_left > 0)
    b_o = keep(scale(b_o, (1 / b_l)[:, None]), m_seeing[:, None])
    o_n = tl.arange(0, BM)
    m_rows = o_n < n_rows
    first, N = result_token(at, sizes, frames, TILE)
    row = (at.b * N + first) * H + at.h
    store_rows(p_o + row * ROW.D, o_n * H * ROW.D, m_rows, b_o, ROW)
    if p_lse is not None:
        b_lse = tl.where(m_seeing, b_m * (exponent * LN_2) + tl.log(b_l), -float("inf"))
        tl.store(p_lse + row + o_n * H, b_lse, mask=m_rows)


def pick_for(table: tuple[FrameConfig, ...], q: Tensor) -> FrameConfig:
    D, size = q.shape[-1], q.element_size()
    return pick(table, arch_of(q), lambda c: c.channels >= D and c.size >= size)


def base_2(sm_scale: float) -> float:
    """The size of a scale for powers of two. Not quite 0: a maximum of -inf is multiplied by it."""
    return max(abs(sm_scale), 1e-30) / math.log(2)


def with_positive_scale(q: Tensor, text: Triple | None, sm_scale: float) -> tuple[Tensor, Text]:
    """Queries whose scores are to be scaled by ``abs(sm_scale)``, and text whose tokens are near one another."""
    q = -q if sm_scale < 0 else q
    if text is None:
        return q, NO_TEXT
    text_q, text_k, text_v = (near(x) for x in text)
    return q, (-text_q if sm_scale < 0 else text_q, text_k, text_v)


def frame_sizes(q: Tensor, k: Tensor, text: Text, mask: FrameMask, q_start: int) -> tuple[Sizes, Frames]:
    """The numbers that the kernels of both directions take by the same names."""
    _, T, S_q, H, _ = q.shape
    L = 0 if text[0] is None else text[0].shape[1]
    frames, _ = frame_bounds(mask, T, k.shape[1], q_start, q.device)
    return Sizes(S_q, k.shape[2], L, H), frames


def query_programs(B: int, sizes: Sizes, frames: Frames, BM: int) -> tuple[int, int]:
    """Programs of a kernel over queries, and tiles per sample and head."""
    tiles = query_tiles(frames.T, sizes.S_q, sizes.L, frames.q_start, frames.group, BM)
    return B * sizes.H * tiles, tiles


def frame_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: Triple | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    text_first: bool,
    text_sees: bool,
    sm_scale: float,
    mask: FrameMask,
    q_start: int,
    lengths: Lengths,
) -> None:
    """q ``(B, T, S_q, H, D)``, k and v ``(B, T_k, S_k, G, D)``, text ``(B, L, heads, D)``, all normalized and rotated.

    Fills out ``(B, T*S_q + L, H, D)`` and lse ``(B, T*S_q + L, H)``.

    Args:
        text: its queries, keys and values, or None.
        text_first: it comes before the video in the result.
        text_sees: it sees the video.
        sm_scale: of the scores.
        lengths: of the video and of the text.
    """
    q, words = with_positive_scale(q, text, sm_scale)
    config = pick_for(FORWARD, q)
    A = step(q, k, v, *(x for x in words if x is not None))
    sides = [token_pair(x, of_text, A) for x, of_text in zip((q, k, v), words)]
    sizes, frames = frame_sizes(q, k, words, mask, q_start)
    programs, tiles = query_programs(q.shape[0], sizes, frames, config.m)
    tile = Tile(
        ROW=split_row(q.shape[4]),
        A=A,
        R=q.shape[3] // k.shape[3],
        BM=config.m,
        BN=config.n,
        FLAT=all(is_flat(x, A) for x in sides),
        TEXT=text is not None,
        TEXT_FIRST=text_first,
        TEXT_SEES=text_sees,
        AMD=amd_alignment(sides, A),
    )
    launch(
        frame_attention_fwd_kernel,
        programs,
        like=q,
        config=config,
        q=sides[0],
        k=sides[1],
        v=sides[2],
        p_o=out,
        p_lse=lse,
        tiles=tiles,
        exponent=base_2(sm_scale),
        TILE=tile,
        lengths=lengths,
        **sizes._asdict(),
        **frames._asdict(),
    )
