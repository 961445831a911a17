"""Spatial, video and cross attention backward: delta, then the queries' gradient, then the keys' and values'.

Every gradient is summed by one program in a fixed order: no atomics, at the price of computing the scores twice (seven
products for five). Probabilities come back from lse; tiles are walked through as forward walks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import Frames, noisy_seeing_run, seeing_run, valid_frames
from vdcore_kernels.core.launch import ValuesConfig, cdiv, how_many, launch, power_of_2, step
from vdcore_kernels.core.tile import (
    LOG2_E,
    Row,
    add,
    column_sum,
    filled,
    keep,
    load_rows,
    mul,
    row_sum,
    scale,
    split_row,
    to,
)
from vdcore_kernels.core.tokens import (
    NEAR,
    At,
    Lengths,
    Runs,
    Sizes,
    Tile,
    amd_alignment,
    is_flat,
    left_tile,
    load_keys,
    load_tokens,
    power,
    query_tile,
    result_token,
    rows_times,
    sequence_rows,
    store_tokens,
    text_length,
    times_rows,
    token_pair,
    valid_key_frames,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.forward import (
    FLOAT32,
    NO_TEXT,
    SMALL,
    FrameConfig,
    Triple,
    base_2,
    frame_sizes,
    pick_for,
    query_programs,
    with_positive_scale,
)

QUERIES = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9", 8, 2, "keys and values of two stages, 128 KB", 128, 64, 128),
    FrameConfig("sm_10", 8, 2, "two stages; 64 keys would spill", 128, 32, 128, registers=255),
    FrameConfig("sm_9|sm_10", 8, 1, "256 channels: one stage", 32, 64, 256),
    FrameConfig("sm_8", 8, 2, "128 queries: half the products of 64 over eight warps", 128, 64, 64),
    FrameConfig("sm_11|sm_12", 8, 2, "the same; 64 keys spill", 128, 32, 64),
    FrameConfig("sm_11|sm_12", 8, 1, "two tiles of 96 channels: two stages spill", 128, 32, 96),
    FrameConfig(SMALL, 8, 2, "the same, 82 KB of shared memory", 128, 32, 128),
    FrameConfig(SMALL, 8, 1, "one stage; 128 queries spill", 64, 32, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "64 KB of shared memory", 32, 16, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 256, 4, registers=255),
)
# m: queries, walked through; n: keys, held.
KEYS = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "two gradients of 64 rows in a warpgroup's registers", 64, 64, 64),
    FrameConfig("sm_9", 8, 2, "64 queries: a second tile of 16 channels is copied by 8 bytes", 64, 128, 80),
    FrameConfig("sm_9", 8, 2, "two gradients of 128 rows take 128 registers", 32, 128, 128),
    FrameConfig("sm_10", 8, 2, "the same", 32, 128, 128, registers=255),
    FrameConfig("sm_9|sm_10", 8, 1, "two gradients of 256 channels leave room for 32 rows", 32, 32, 256),
    FrameConfig(SMALL, 4, 2, "two stages of 32 queries; 64 spill", 32, 64, 64),
    FrameConfig(SMALL, 4, 1, "64 keys over four warps: half the products of eight; 32 queries spill", 16, 64, 96),
    FrameConfig(SMALL, 8, 2, "64 queries: two thirds of the products of 32 over eight warps", 64, 64, 128),
    FrameConfig(SMALL, 8, 1, "one stage", 32, 32, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "64 KB of shared memory", 16, 32, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4, registers=255),
    FrameConfig(SMALL, 8, 1, FLOAT32, 16, 16, 256, 4, registers=255),
    FrameConfig("sm_9|sm_10|gfx", 8, 1, FLOAT32, 32, 32, 256, 4, registers=255),
)
DELTA = ValuesConfig("", 4, 1, "4 loads of 16 bytes a thread of out and of its gradient", 4096)


@triton.jit(do_not_specialize=["N", "H", "exponent"])
def row_delta_kernel(
    p_o, do, p_lse, p_dlse, p_pairs, N, H, exponent, ROW: tl.constexpr, A: tl.constexpr, BN: tl.constexpr
):
    """One program: of BN rows of one sample and head lse, in units of the scores, and delta, the sum of out * dout over
    channels less dlse: a pair of one load, side by side for the rows of a tile.

    p_o: (B, N, H, D), contiguous. do: Rows (B, N, H, D), t unused. p_lse, p_dlse or None: (B, N, H). p_pairs: (B, H, N,
    2), float32.
    """
    blocks = tl.cdiv(N, BN)
    i_h = (tl.program_id(0) % H).to(tl.int64)  # heads first: they share lines of lse
    i_b = (tl.program_id(0) // H // blocks).to(tl.int64)
    o_n = tl.program_id(0) // H % blocks * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_row = (i_b * N + o_n) * H + i_h
    p_do = do.p + (i_b * do.b + i_h * do.h) * A
    b_o = to(load_rows(p_o, o_row * ROW.D, m_n, ROW), tl.float32)  # [BN, W]
    b_do = to(load_rows(p_do, o_n.to(tl.int64) * do.s * A, m_n, ROW), tl.float32)
    b_lse = tl.load(p_lse + o_row, mask=m_n, other=0.0) * (LOG2_E / exponent)
    b_d = tl.reshape(row_sum(mul(b_o, b_do), 0), (BN,))
    if p_dlse is not None:
        b_d -= tl.load(p_dlse + o_row, mask=m_n, other=0.0)
    p_row = p_pairs + ((i_b * H + i_h) * N + o_n) * 2
    tl.store(p_row[:, None] + tl.arange(0, 2)[None, :], tl.join(b_lse, b_d), mask=m_n[:, None])


class Queries(NamedTuple):
    """A tile of queries, their dout, and lse, in units of the scores, and delta."""

    q: Any
    do: Any
    lse: Any
    delta: Any


@triton.jit
def load_pairs(p_pairs, first, m, WIDE: tl.constexpr):
    """lse and delta of rows from ``first`` on, [BM]; 0 where m [BM] is false.

    WIDE: in one piece of 64 bits, which one thread copies; else in two of 32, which take fewer registers.
    """
    o_m = tl.arange(0, m.shape[0])
    if WIDE:
        pairs = tl.load(p_pairs.to(tl.pointer_type(tl.int64)) + (first + o_m), mask=m, other=0)
        return pairs.to(tl.int32).to(tl.float32, bitcast=True), (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        p_row = p_pairs + (first + o_m) * 2
        return tl.split(tl.load(p_row[:, None] + tl.arange(0, 2)[None, :], mask=m[:, None], other=0.0))


@triton.jit
def load_queries(
    q, do, p_pairs, at, m, sizes, frames, NO_LSE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr = False
):
    """BM queries; where m [BM] is false, 0, and NO_LSE for lse."""
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    o_m = tl.arange(0, TILE.BM)
    b_q = load_tokens(q, at, m, sizes.S_q, TILE.BM, TILE)  # [BM, W]
    first, N = result_token(at, sizes, frames, TILE)
    b_do = load_rows(do.p + (at.b * do.b + at.h * do.h + first * do.s) * A, o_m * do.s * A, m, ROW)
    b_lse, b_delta = load_pairs(p_pairs, (at.b * sizes.H + at.h) * N + first, m, WIDE)
    return Queries(b_q, b_do, tl.where(m, b_lse, NO_LSE), b_delta)


@triton.jit
def first_keys(at, runs, N):
    """The first N keys, or fewer, in the longest of the runs, of at's sample and head; and how many these are."""
    low, low_end, begin, end, n_text = runs
    n_low = low_end - low
    is_text = n_text > tl.maximum(n_low, end - begin)
    is_run = (end - begin >= n_low) & ~is_text
    start = tl.where(is_run, begin, tl.where(is_text, 0, low))
    count = tl.minimum(tl.where(is_text, n_text, tl.where(is_run, end - begin, n_low)), N)
    return At(is_text, at.b, at.h, start), count


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
    i_g = at.h // TILE.R
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    queries = load_queries(q, do, p_pairs, at, m_live, sizes, frames, NO_LSE=0.0, TILE=TILE, WIDE=True)
    b_dq = filled(BM, 0.0, ROW)
    b_sum = tl.full([BM], 0.0, tl.float32)
    if p_dlse is not None:
        row, N = result_token(at, sizes, frames, TILE)
        b_sum -= tl.load(p_dlse + (at.b * N + row + o_n) * H + at.h, mask=m_live, other=0.0)
    n_low, n_run, n_txt, n_left = walk(runs, BN)
    for i in range(n_low + n_run + n_txt):
        is_text, first = whole_tile(i, n_low, n_run, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, first, S_k, exponent, WHOLE=True, TILE=TILE)
    for i in tl.range(n_left, num_stages=1):
        is_text, first, stop = left_tile(i, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, stop, S_k, exponent, WHOLE=False, TILE=TILE)
    # out was rounded, so delta errs, by the same for all keys of a row: dq would err by that times the keys' mean. But
    # a row of dS adds up to dlse, and what it does add up to tells the error, which the keys' kernel is spared.
    row, N = result_token(at, sizes, frames, TILE)
    p_delta = p_pairs + ((at.b * H + at.h) * N + row + o_n) * 2 + 1
    tl.store(p_delta, queries.delta + b_sum, mask=m_live)
    b_mean = mean_key(k, At(False, at.b, i_g, 0), runs, S_k, 16, TILE)  # [1, W]
    b_dq = add(b_dq, scale(b_mean, -b_sum[:, None]))
    b_dq = keep(scale(b_dq, sm_scale), m_live[:, None])
    store_tokens(dq, at, o_n < n_rows, S_q, b_dq, BM, TILE)


@triton.jit
def key_tile(i, i_b, i_g, lengths, sizes, frames, group, TILE: tl.constexpr):
    """The i-th tile of keys: where it is, how many rows it has, how many of them live, and the queries that see it."""
    BN: tl.constexpr = TILE.BN
    per_group = tl.cdiv(group * sizes.S_k, BN)
    groups = tl.cdiv(frames.T_k, group)
    valid, last = valid_frames(lengths.frames, i_b, frames)
    first = i // per_group * group
    stop = tl.minimum(first + group, frames.T_k)
    o = i % per_group * BN
    start = first * sizes.S_k + o
    n_rows = tl.minimum(tl.maximum((stop - first) * sizes.S_k - o, 0), BN)
    shown = (tl.minimum(stop, valid_key_frames(lengths, i_b, frames.T_k)) - first) * sizes.S_k
    if lengths.tokens is not None:
        of_frame = tl.load(lengths.tokens + i_b * frames.T_k + first, mask=first < frames.T_k, other=0)
        shown = tl.minimum(tl.maximum(of_frame, 0), shown).to(tl.int32)
    n_live = tl.minimum(tl.maximum(shown - o, 0), BN)
    begin, end = seeing_run(first, last, frames)
    begin, end = (begin - frames.q_start) * sizes.S_q, (end - frames.q_start) * sizes.S_q
    low, low_end = 0, 0
    if frames.clean is not None:
        low, low_end = begin, tl.maximum(begin, end)
        begin, end = noisy_seeing_run(first, last, frames)
        begin, end = (begin - frames.q_start) * sizes.S_q, (end - frames.q_start) * sizes.S_q
    is_text = i < 0
    n_text = 0
    if TILE.TEXT:
        of_text = text_length(lengths, i_b, sizes.L)
        is_text = i >= groups * per_group
        o_text = (i - groups * per_group) * BN
        start = tl.where(is_text, o_text, start)
        n_rows = tl.where(is_text, tl.minimum(sizes.L - o_text, BN), n_rows)
        n_live = tl.where(is_text, tl.minimum(tl.maximum(of_text - o_text, 0), BN), n_live)
        begin = tl.where(is_text, 0, begin)
        end = tl.where(is_text, (last - frames.q_start) * sizes.S_q, end)
        low_end = tl.where(is_text, low, low_end)
        n_text = of_text
        if not TILE.TEXT_SEES:
            n_text = tl.where(is_text, of_text, 0)
    if n_live <= 0:
        low_end, end, n_text = low + 0, begin, 0
    return At(is_text, i_b, i_g, start), n_rows, n_live, Runs(low, low_end, begin, end, n_text)


@triton.jit
def _to_keys(state, k, v, queries, exponent):
    """Gradients of keys, but for the scale, and of values [BN, W] after a tile of queries."""
    b_dk, b_dv = state
    b_p = power(times_rows(k, queries.q), queries.lse[None, :], exponent)  # [BN, BM]
    b_dv = rows_times(b_p.to(queries.do[0].dtype), queries.do, b_dv)
    b_ds = b_p * (times_rows(v, queries.do) - queries.delta[None, :])
    return rows_times(b_ds.to(queries.q[0].dtype), queries.q, b_dk), b_dv


@triton.jit(do_not_specialize=[*Sizes._fields, *Frames._fields, "tiles", "key_group", "splits", "B"])
def frame_attention_bwd_kv_kernel(
    q,
    k,
    v,
    do,
    p_pairs,
    dk,
    dv,
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
    key_group,
    splits,
    B,
    exponent,
    sm_scale,
    TILE: tl.constexpr,
):
    """One program: gradients of a tile of BN keys of one sample and key/value head, over all queries that see them.

    do, p_pairs: as frame_attention_bwd_q_kernel's.
    dk: as k, dv: as v, with splits (splits*B, ...) of partial sums. tiles: of keys, per sample and head.
    key_group: frames whose keys the same queries see. splits: programs that share a tile's queries. B: samples.
    sm_scale: its size. The others as frame_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    R: tl.constexpr = TILE.R
    ROW: tl.constexpr = TILE.ROW
    WIDE: tl.constexpr = ROW.D > 64
    sizes, frames = Sizes(S_q, S_k, L, H), Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    G = H // R
    i_tile = tl.program_id(0) % tiles
    i_split = tl.program_id(0) // tiles % splits
    i_bg = tl.program_id(0) // tiles // splits
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    at, n_rows, n_live, runs = key_tile(i_tile, i_b, i_g, lengths, sizes, frames, key_group, TILE)
    o_n = tl.arange(0, BN)
    m_live = o_n < n_live
    b_k = load_tokens(k, at, m_live, S_k, BN, TILE)  # [BN, W]
    b_v = load_tokens(v, at, m_live, S_k, BN, TILE)
    b_dk = filled(BN, 0.0, ROW)
    b_dv = filled(BN, 0.0, ROW)
    n_low, n_run, n_txt, n_left = walk(runs, BM)
    n_whole = n_low + n_run + n_txt
    for i in range(i_split, n_whole * R, splits):
        i_r = i // n_whole if R > 1 else 0
        is_text, first = whole_tile(i - i_r * n_whole, n_low, n_run, runs, BM)
        at_q = At(is_text, i_b, i_g * R + i_r, first)
        m = tl.full([BM], 1, tl.int1)
        queries = load_queries(q, do, p_pairs, at_q, m, sizes, frames, NO_LSE=float("inf"), TILE=TILE, WIDE=WIDE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    for i in tl.range(i_split, n_left * R, splits, num_stages=1):
        i_r = i // n_left if R > 1 else 0
        is_text, first, stop = left_tile(i - i_r * n_left, runs, BM)
        at_q = At(is_text, i_b, i_g * R + i_r, first)
        m = first + tl.arange(0, BM) < stop  # beyond: probability 0, by an infinite lse
        queries = load_queries(q, do, p_pairs, at_q, m, sizes, frames, NO_LSE=float("inf"), TILE=TILE, WIDE=WIDE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    b_dk = keep(scale(b_dk, sm_scale), m_live[:, None])
    b_dv = keep(b_dv, m_live[:, None])
    part = At(at.is_text, i_split * B + i_b, i_g, at.start)
    store_tokens(dk, part, o_n < n_rows, S_k, b_dk, BN, TILE)
    store_tokens(dv, part, o_n < n_rows, S_k, b_dv, BN, TILE)


def gradient_row(D: int) -> Row:
    """One tile above 128 channels: a second one's operands leave no registers for two gradients."""
    return split_row(D) if D <= 128 else Row(D, D, power_of_2(D))


def row_pairs(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, row: Row, A: int, exponent: float
) -> Tensor:
    """Of dout ``(B, N, H, D)``: lse in units of the scores, and delta, ``(B, H, N, 2)``, float32."""
    B, N, H, D = dout.shape
    pairs = torch.empty(B, H, N, 2, dtype=torch.float32, device=out.device)
    BN = how_many(DELTA.values, power_of_2(D))
    launch(
        row_delta_kernel,
        B * H * cdiv(N, BN),
        like=out,
        config=DELTA,
        p_o=out,
        do=sequence_rows(dout, A),
        p_lse=lse,
        p_dlse=dlse,
        p_pairs=pairs,
        N=N,
        H=H,
        exponent=exponent,
        ROW=row,
        A=A,
        BN=BN,
    )
    return pairs


# A kv program walks through all queries that see its keys: with few keys, as text has, they share the walk.
_PROGRAMS = 512


def _shares(B: int, G: int, sizes: Sizes, frames: Frames, config: FrameConfig, has_text: bool) -> dict[str, int]:
    """How programs share out the keys and their queries.

    Frames form a group that share a chunk and are sinks together or not: a sink may end inside a chunk. The first frame
    of a shot is in a group of its own.
    """
    group = min(math.gcd(frames.group, frames.sink) if frames.shots is None else 1, frames.T_k)
    tiles = cdiv(frames.T_k, group) * cdiv(group * sizes.S_k, config.n) + cdiv(sizes.L, config.n)
    most = cdiv(frames.T * sizes.S_q, 8 * config.m)
    splits = 1 if has_text else max(min(_PROGRAMS // (B * G * tiles), most), 1)
    return {"tiles": tiles, "key_group": group, "splits": splits, "B": B}


def frame_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: Triple | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Triple,
    text_gradients: Triple | None,
    *,
    text_first: bool,
    text_sees: bool,
    sm_scale: float,
    mask: FrameMask,
    q_start: int,
    lengths: Lengths,
) -> None:
    """Fills the gradients of what frame_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    B, G = q.shape[0], k.shape[3]
    # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
    q, words = with_positive_scale(q, text, sm_scale)
    dout = dout if dout.stride(1) < NEAR else dout.contiguous()
    sizes, frames = frame_sizes(q, k, words, mask, q_start)
    config = pick_for(KEYS, q)
    shares: dict[str, Any] = _shares(B, G, sizes, frames, config, text is not None)
    splits = shares["splits"]
    dq, dk, dv = gradients
    if splits > 1:
        dk, dv = (torch.empty(splits * B, *k.shape[1:], dtype=torch.float32, device=q.device) for _ in range(2))
    A = step(q, k, v, dout, *gradients, *(text or ()), *(text_gradients or ()), dk)
    dq_text, dk_text, dv_text = text_gradients or NO_TEXT
    sides: dict[str, Any] = {name: token_pair(x, of_text, A) for name, x, of_text in zip("qkv", (q, k, v), words)}
    of_q, of_k, of_v = token_pair(dq, dq_text, A), token_pair(dk, dk_text, A), token_pair(dv, dv_text, A)
    row = gradient_row(q.shape[4])
    exponent = base_2(sm_scale)
    pairs = row_pairs(out, lse, dout, dlse, row=row, A=A, exponent=exponent)
    tile = Tile(
        ROW=row,
        A=A,
        R=q.shape[3] // G,
        BM=config.m,
        BN=config.n,
        FLAT=all(is_flat(x, A) for x in (*sides.values(), of_q, of_k, of_v)),
        TEXT=text is not None,
        TEXT_FIRST=text_first,
        TEXT_SEES=text_sees,
        AMD=amd_alignment((*sides.values(), of_q, of_k, of_v), A),
    )
    numbers: dict[str, Any] = {**sizes._asdict(), **frames._asdict(), "exponent": exponent}
    sides |= {"do": sequence_rows(dout, A)}
    shared: dict[str, Any] = {"like": q, **sides, "p_pairs": pairs, "lengths": lengths, **numbers}
    by_query = pick_for(QUERIES, q)
    programs, tiles = query_programs(B, sizes, frames, by_query.m)
    launch(
        frame_attention_bwd_q_kernel,
        programs,
        config=by_query,
        dq=of_q,
        p_dlse=dlse,
        tiles=tiles,
        sm_scale=sm_scale,
        TILE=tile._replace(BM=by_query.m, BN=by_query.n),
        **shared,
    )
    launch(
        frame_attention_bwd_kv_kernel,
        B * G * splits * shares["tiles"],
        config=config,
        dk=of_k,
        dv=of_v,
        sm_scale=abs(sm_scale),
        TILE=tile,
        **shares,
        **shared,
    )
    if splits > 1:
        for whole, parts in zip(gradients[1:], (dk, dv)):
            whole.copy_(parts.unflatten(0, (splits, B)).sum(0))
