"""Attention of video tokens to the tokens of visible frames and to text: spatial, video and cross attention, forward.

Bound by arithmetic: 4 D FLOP per visible pair. A tile of queries keeps its result in registers and walks through its
runs of keys; q and k come normalized and rotated, which is one pass over them beside S passes here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.frames import Frames
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import LN_2, filled, keep, scale, split_row, store_rows
from vdcore_kernels.core.tokens import (
    Sizes,
    key_head,
    left_tile,
    load_keys,
    load_tokens,
    power,
    query_tile,
    result_row,
    rows_times,
    times_rows,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, SMALLER, FrameConfig, FrameProblem, pick_for

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
    FrameConfig(SMALLER, 4, 3, "48 KB of shared memory: two programs", 64, 64, 64),
    FrameConfig(SMALLER, 4, 2, "57 KB of shared memory; 64 keys spill", 64, 32, 128),
    FrameConfig(SMALL, 8, 1, "128 queries: half the products of 64 over eight warps", 128, 32, 160),
    FrameConfig(SMALL, 8, 1, "256 channels: warps repeat none of 64 keys' products, of 32 half", 64, 64, 256),
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
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    b_q = load_tokens(q, at, m_live, S_q, BM, TILE)  # [BM, W]
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.full([BM], 0.0, tl.float32)
    b_o = filled(BM, 0.0, ROW)
    of_keys, steps = key_head(at, TILE), walk(runs, BN)
    for i in range(steps.n_whole):
        at_k = whole_tile(i, of_keys, steps, BN)
        b_m, b_l, b_o = _attend((b_m, b_l, b_o), b_q, k, v, at_k, at_k.start, S_k, exponent, WHOLE=True, TILE=TILE)
    for i in tl.range(steps.n_left, num_stages=1):
        at_k, stop = left_tile(i, of_keys, steps, BN)
        b_m, b_l, b_o = _attend((b_m, b_l, b_o), b_q, k, v, at_k, stop, S_k, exponent, WHOLE=False, TILE=TILE)
    m_seeing = m_live & (steps.n_whole + steps.n_left > 0)
    b_o = keep(scale(b_o, (1 / b_l)[:, None]), m_seeing[:, None])
    m_rows = o_n < n_rows
    row = result_row(at, sizes, frames, TILE)
    store_rows(p_o + row * ROW.D, o_n * H * ROW.D, m_rows, b_o, ROW)
    if p_lse is not None:
        b_lse = tl.where(m_seeing, b_m * (exponent * LN_2) + tl.log(b_l), -float("inf"))
        tl.store(p_lse + row + o_n * H, b_lse, mask=m_rows)


def frame_forward(problem: FrameProblem, out: Tensor, lse: Tensor | None) -> None:
    """Fills out ``(B, T*S_q + L, H, D)`` and lse ``(B, T*S_q + L, H)``."""
    p = problem.with_positive_scores()
    config = pick_for(FORWARD, p.q)
    layout = p.layout()
    programs, tiles = p.query_programs(config.m)
    launch(
        frame_attention_fwd_kernel,
        programs,
        like=p.q,
        config=config,
        q=layout.pairs[0],
        k=layout.pairs[1],
        v=layout.pairs[2],
        p_o=out,
        p_lse=lse,
        tiles=tiles,
        TILE=p.constants(layout, config, split_row(p.q.shape[4])),
        **p.numbers,
    )
