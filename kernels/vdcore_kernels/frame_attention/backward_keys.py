"""Backward: the gradients of a tile of keys and of their values, which walks through the queries that see them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from vdcore_kernels.core.frames import Frames, noisy_seeing_run, seeing_run, valid_frames
from vdcore_kernels.core.launch import cdiv, launch
from vdcore_kernels.core.tile import filled, keep, scale
from vdcore_kernels.core.tokens import (
    At,
    Runs,
    Sizes,
    left_tile,
    load_tokens,
    power,
    rows_times,
    store_tokens,
    text_length,
    times_rows,
    valid_key_frames,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.backward_rows import Given, load_queries
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, SMALLER, FrameConfig, FrameProblem, pick_for

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
    FrameConfig("sm_80", 8, 1, "1.3 instructions a pair for 2.6 of 32, whose products warps repeat", 64, 64, 256),
    FrameConfig(SMALLER, 8, 1, "82 KB of shared memory: warps repeat half the products; four warps spill", 32, 32, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "64 KB of shared memory", 16, 32, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4, registers=255),
    FrameConfig(SMALL, 8, 1, FLOAT32, 16, 16, 256, 4, registers=255),
    FrameConfig("sm_9|sm_10|gfx", 8, 1, FLOAT32, 32, 32, 256, 4, registers=255),
)


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
    steps = walk(runs, BM)
    for i in range(i_split, steps.n_whole * R, splits):
        i_r = i // steps.n_whole if R > 1 else 0
        head = At(False, i_b, i_g * R + i_r, 0)
        at_q = whole_tile(i - i_r * steps.n_whole, head, steps, BM)
        m = tl.full([BM], 1, tl.int1)
        queries = load_queries(q, do, p_pairs, at_q, m, sizes, frames, NO_LSE=float("inf"), TILE=TILE, WIDE=WIDE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    for i in tl.range(i_split, steps.n_left * R, splits, num_stages=1):
        i_r = i // steps.n_left if R > 1 else 0
        head = At(False, i_b, i_g * R + i_r, 0)
        at_q, stop = left_tile(i - i_r * steps.n_left, head, steps, BM)
        m = at_q.start + tl.arange(0, BM) < stop  # beyond: probability 0, by an infinite lse
        queries = load_queries(q, do, p_pairs, at_q, m, sizes, frames, NO_LSE=float("inf"), TILE=TILE, WIDE=WIDE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    b_dk = keep(scale(b_dk, sm_scale), m_live[:, None])
    b_dv = keep(b_dv, m_live[:, None])
    part = At(at.is_text, i_split * B + i_b, i_g, at.start)
    store_tokens(dk, part, o_n < n_rows, S_k, b_dk, BN, TILE)
    store_tokens(dv, part, o_n < n_rows, S_k, b_dv, BN, TILE)


# A program walks through all queries that see its keys: with few keys, as text has, programs share the walk.
_PROGRAMS = 512


@dataclass(frozen=True)
class KeyPrograms:
    """How programs share out the keys and their queries.

    Args:
        group: frames whose keys the same queries see.
        tiles: of keys, per sample and head.
        splits: programs that share a tile's queries: gradients are partial sums of so many.
    """

    config: FrameConfig
    group: int
    tiles: int
    splits: int


def key_programs(p: FrameProblem) -> KeyPrograms:
    """Frames form a group that share a chunk and are sinks together or not: a sink may end inside a chunk. The first
    frame of a shot is in a group of its own.
    """
    config, sizes, frames = pick_for(KEYS, p.q), p.sizes, p.frames
    group = min(math.gcd(frames.group, frames.sink) if frames.shots is None else 1, frames.T_k)
    tiles = cdiv(frames.T_k, group) * cdiv(group * sizes.S_k, config.n) + cdiv(sizes.L, config.n)
    most = cdiv(frames.T * sizes.S_q, 8 * config.m)
    B, G = p.k.shape[0], p.k.shape[3]
    splits = 1 if p.text is not None else max(min(_PROGRAMS // (B * G * tiles), most), 1)
    return KeyPrograms(config, group, tiles, splits)


def launch_keys(p: FrameProblem, given: Given, programs: KeyPrograms) -> None:
    """Fills the gradients of k and v, or partial sums of them."""
    B, G = p.k.shape[0], p.k.shape[3]
    launch(
        frame_attention_bwd_kv_kernel,
        B * G * programs.splits * programs.tiles,
        like=p.q,
        config=programs.config,
        dk=given.layout.pairs[4],
        dv=given.layout.pairs[5],
        key_group=programs.group,
        tiles=programs.tiles,
        splits=programs.splits,
        B=B,
        sm_scale=abs(p.sm_scale),
        TILE=p.constants(given.layout, programs.config, given.row),
        **given.tensors(),
        **p.numbers,
    )
