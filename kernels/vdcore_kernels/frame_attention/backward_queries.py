"""Backward: the gradient of a tile of queries, which walks through its keys as forward does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.frames import Frames
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import add, column_sum, filled, keep, scale, to
from vdcore_kernels.core.tokens import (
    Sizes,
    first_keys,
    key_head,
    left_tile,
    load_keys,
    load_tokens,
    power,
    query_tile,
    result_token,
    rows_times,
    store_tokens,
    times_rows,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.backward_rows import Given, load_queries
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, SMALLER, FrameConfig, FrameProblem, pick_for

QUERIES = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9", 8, 2, "keys and values of two stages, 128 KB", 128, 64, 128),
    FrameConfig("sm_10", 8, 2, "two stages; 64 keys would spill", 128, 32, 128, registers=255),
    FrameConfig("sm_9|sm_10", 8, 1, "256 channels: one stage", 32, 64, 256),
    FrameConfig("sm_8", 8, 2, "128 queries: half the products of 64 over eight warps", 128, 64, 64),
    FrameConfig("sm_11|sm_12", 8, 2, "the same; 64 keys spill", 128, 32, 64),
    FrameConfig("sm_8", 8, 2, "the same of two tiles of 72 channels", 128, 32, 80),
    FrameConfig(SMALLER, 8, 1, "two tiles of 96 channels: two stages spill", 128, 32, 96),
    FrameConfig(SMALL, 8, 2, "the same, 82 KB of shared memory", 128, 32, 128),
    FrameConfig("sm_80", 8, 1, "1.3 instructions a pair for 2.2 of 32 keys, whose products warps repeat", 64, 64, 256),
    FrameConfig(SMALLER, 8, 1, "98 KB of shared memory; 64 queries with 32 keys repeat products", 32, 64, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "64 KB of shared memory", 32, 16, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 256, 4, registers=255),
)


@triton.jit
def mean_key(k, at, runs, S, N: tl.constexpr, TILE: tl.constexpr):
    """The mean [1, W] of the first N keys in the longest of the runs, of at's sample and head."""
    at, count = first_keys(at, runs, N)
    b_k = load_tokens(k, at, tl.arange(0, N) < count, S, N, TILE)
    return scale(column_sum(to(b_k, tl.float32)), 1.0 / tl.maximum(count, 1))


@triton.jit
def _to_queries(state, queries, k, v, at, stop, S, exponent, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Gradient of the queries [BM, W], but for the scale, and row sums [BM] of dS, after keys [at.start, stop)."""
    b_dq, b_sum = state
    b_k, b_v, m = load_keys(k, v, at, stop, S, WHOLE, TILE)  # [BN, W]
    b_p = power(times_rows(queries.q, b_k), queries.lse[:, None], exponent)  # [BM, BN]
    if not WHOLE:
        b_p = tl.where(m[None, :], b_p, 0.0)
    b_ds = (b_p * (times_rows(queries.do, b_v) - queries.delta[:, None])).to(b_k[0].dtype)
    return rows_times(b_ds, b_k, b_dq), b_sum + tl.sum(b_ds.to(tl.float32), 1)


@triton.jit(do_not_specialize=[*Sizes._fields, *Frames._fields, "tiles"])
def frame_attention_bwd_q_kernel(
    q,
    k,
    v,
    do,
    p_pairs,
    dq,
    p_dlse,
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
    sm_scale,
    TILE: tl.constexpr,
):
    """One program: the gradient of a tile of BM queries of one sample and head, over all keys that they see.

    do: Rows (B, N, H, D), t unused. p_pairs: (B, H, N, 2), of row_delta_kernel: delta becomes what makes a
    row of dS add up to dlse. dq: as q.
    p_dlse: (B, N, H), or None. The others as frame_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    ROW: tl.constexpr = TILE.ROW
    sizes, frames = Sizes(S_q, S_k, L, H), Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    at, n_rows, n_live, runs = query_tile(tiles, lengths, sizes, frames, TILE)
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    queries = load_queries(q, do, p_pairs, at, m_live, sizes, frames, NO_LSE=0.0, TILE=TILE, WIDE=True)
    b_dq = filled(BM, 0.0, ROW)
    b_sum = tl.full([BM], 0.0, tl.float32)
    if p_dlse is not None:
        row, N = result_token(at, sizes, frames, TILE)
        b_sum -= tl.load(p_dlse + (at.b * N + row + o_n) * H + at.h, mask=m_live, other=0.0)
    of_keys, steps = key_head(at, TILE), walk(runs, BN)
    for i in range(steps.n_whole):
        at_k = whole_tile(i, of_keys, steps, BN)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, at_k.start, S_k, exponent, WHOLE=True, TILE=TILE)
    for i in tl.range(steps.n_left, num_stages=1):
        at_k, stop = left_tile(i, of_keys, steps, BN)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, stop, S_k, exponent, WHOLE=False, TILE=TILE)
    # out was rounded, so delta errs, by the same for all keys of a row: dq would err by that times the keys' mean. But
    # a row of dS adds up to dlse, and what it does add up to tells the error, which the keys' kernel is spared.
    row, N = result_token(at, sizes, frames, TILE)
    p_delta = p_pairs + ((at.b * H + at.h) * N + row + o_n) * 2 + 1
    tl.store(p_delta, queries.delta + b_sum, mask=m_live)
    b_mean = mean_key(k, of_keys, runs, S_k, 16, TILE)  # [1, W]
    b_dq = add(b_dq, scale(b_mean, -b_sum[:, None]))
    b_dq = keep(scale(b_dq, sm_scale), m_live[:, None])
    store_tokens(dq, at, o_n < n_rows, S_q, b_dq, BM, TILE)


def launch_queries(p: FrameProblem, given: Given, dlse: Tensor | None) -> None:
    """Fills the gradient of q."""
    config = pick_for(QUERIES, p.q)
    programs, tiles = p.query_programs(config.m)
    launch(
        frame_attention_bwd_q_kernel,
        programs,
        like=p.q,
        config=config,
        dq=given.layout.pairs[3],
        p_dlse=dlse,
        tiles=tiles,
        sm_scale=p.sm_scale,
        TILE=p.constants(given.layout, config, given.row),
        **given.tensors(),
        **p.numbers,
    )
