"""Spatial, video and cross attention backward: delta, then the keys' and values' gradient, then the queries'.

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

from vdcore_kernels.core.frames import Frames, noisy_seeing_run, seeing_run, valid_frames
from vdcore_kernels.core.launch import Config, cdiv, launch, power_of_2, step
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
    Runs,
    Sizes,
    Tile,
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
    FrameConfig,
    Triple,
    base_2,
    frame_arguments,
    pick_for,
    query_programs,
    with_positive_scale,
)

QUERIES = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "predicted: a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9", 8, 2, "predicted: keys and values of two stages, 128 KB", 128, 64, 128),
    FrameConfig("sm_10", 8, 2, "predicted: two stages; 64 keys would spill", 128, 32, 128),
    FrameConfig("sm_9|sm_10", 8, 1, "predicted: 256 channels: one stage", 32, 64, 256),
    FrameConfig("sm_8", 4, 2, "predicted: two stages of 64 keys", 64, 64, 64),
    FrameConfig("sm_8", 8, 1, "predicted: two tiles of 72 channels and 64 keys would spill", 64, 32, 128),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 64, 32, 256),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "predicted: 64 KB of shared memory", 32, 16, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4),
    FrameConfig("", 8, 1, FLOAT32, 32, 32, 256, 4),
)
# m: queries, walked through; n: keys, held.
KEYS = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "predicted: two gradients of 64 rows in a warpgroup's registers", 64, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "predicted: two gradients of 128 rows take 128 registers", 32, 128, 128),
    FrameConfig("sm_9|sm_10", 8, 1, "predicted: two gradients of 256 channels leave room for 32 rows", 32, 32, 256),
    FrameConfig("sm_8", 4, 2, "predicted: two stages of 64 queries", 64, 64, 64),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 32, 64, 128),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 32, 32, 256),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "predicted: 64 KB of shared memory", 16, 32, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4),
    FrameConfig("", 8, 1, FLOAT32, 32, 32, 256, 4),
)
DELTA = Config("", 4, 1, "predicted: bound by memory: 16 values per thread of out and its gradient")


@triton.jit(do_not_specialize=["N", "H", "count"])
def row_delta_kernel(p_o, do, p_dlse, p_delta, N, H, count, ROW: tl.constexpr, A: tl.constexpr, BN: tl.constexpr):
    """One program: delta of BN of all B*N*H rows (count), the sum of out * dout over channels, less dlse.

    p_o: (B, N, H, D), contiguous. do: Rows (B, N, H, D), t unused. p_delta, p_dlse or None: (B, N, H).
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < count
    o_do = (o_n // H // N) * do.b + (o_n // H % N) * do.s + (o_n % H) * do.h
    b_o = to(load_rows(p_o, o_n * ROW.D, m_n, ROW), tl.float32)  # [BN, W]
    b_do = to(load_rows(do.p, o_do * A, m_n, ROW), tl.float32)
    b_d = tl.reshape(row_sum(mul(b_o, b_do), 0), (BN,))
    if p_dlse is not None:
        b_d -= tl.load(p_dlse + o_n, mask=m_n, other=0.0)
    tl.store(p_delta + o_n, b_d, mask=m_n)


class Given(NamedTuple):
    """What both kernels know of the result: Rows (B, N, H, D) of its gradient, (B, N, H) of lse and of delta."""

    do: Any
    p_lse: Any
    p_delta: Any


class Queries(NamedTuple):
    """A tile of queries, their dout, and lse, in units of the scores, and delta."""

    q: Any
    do: Any
    lse: Any
    delta: Any


@triton.jit
def _load_queries(q, given, at, m, sizes, frames, exponent, NO_LSE: tl.constexpr, TILE: tl.constexpr):
    """BM queries, and where their rows begin in (B, N, H); where m [BM] is false, 0, and NO_LSE for lse."""
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    H, do = sizes.H, given.do
    o_m = tl.arange(0, TILE.BM)
    b_q = load_tokens(q, at, m, sizes.S_q, TILE.BM, TILE)  # [BM, W]
    first, N = result_token(at, sizes, frames, TILE)
    b_do = load_rows(do.p + (at.b * do.b + at.h * do.h + first * do.s) * A, o_m * do.s * A, m, ROW)
    row = (at.b * N + first) * H + at.h
    b_lse = tl.load(given.p_lse + row + o_m * H, mask=m, other=NO_LSE) * (LOG2_E / exponent)
    return Queries(b_q, b_do, b_lse, tl.load(given.p_delta + row + o_m * H, mask=m, other=0.0)), row


@triton.jit
def _mean_key(k, at, runs, S, N: tl.constexpr, TILE: tl.constexpr):
    """The mean [1, W] of the first N keys in the longest of the runs, of at's sample and head."""
    low, low_end, begin, end, n_text = runs
    n_low = low_end - low
    is_text = n_text > tl.maximum(n_low, end - begin)
    is_run = (end - begin >= n_low) & ~is_text
    start = tl.where(is_run, begin, tl.where(is_text, 0, low))
    count = tl.minimum(tl.where(is_text, n_text, tl.where(is_run, end - begin, n_low)), N)
    b_k = load_tokens(k, At(is_text, at.b, at.h, start), tl.arange(0, N) < count, S, N, TILE)
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


@triton.jit(do_not_specialize=["sizes", "frames", "tiles"])
def frame_attention_bwd_q_kernel(
    q, k, v, given, dq, p_dlse, lengths, sizes, frames, tiles, exponent, sm_scale, TILE: tl.constexpr
):
    """One program: the gradient of a tile of BM queries of one sample and head, over all keys that they see.

    given: Given. dq: as q. p_dlse: (B, N, H), or None. The others as frame_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    ROW: tl.constexpr = TILE.ROW
    at, n_rows, n_live, runs = query_tile(tiles, lengths, sizes, frames, TILE)
    i_g = at.h // TILE.R
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    queries, row = _load_queries(q, given, at, m_live, sizes, frames, exponent, NO_LSE=0.0, TILE=TILE)
    b_dq = filled(BM, 0.0, ROW)
    b_sum = tl.full([BM], 0.0, tl.float32)
    if p_dlse is not None:
        b_sum -= tl.load(p_dlse + row + o_n * sizes.H, mask=m_live, other=0.0)
    n_low, n_run, n_txt, n_left = walk(runs, BN)
    for i in range(n_low + n_run + n_txt):
        is_text, first = whole_tile(i, n_low, n_run, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, first, sizes.S_k, exponent, WHOLE=True, TILE=TILE)
    for i in range(n_left):
        is_text, first, stop = left_tile(i, runs, BN)
        at_k = At(is_text, at.b, i_g, first)
        b_dq, b_sum = _to_queries((b_dq, b_sum), queries, k, v, at_k, stop, sizes.S_k, exponent, WHOLE=False, TILE=TILE)
    # out was rounded, so delta errs, by the same for all keys of a row: dq would err by that times the keys' mean. But
    # a row of dS adds up to dlse, and what it does add up to tells the error.
    b_mean = _mean_key(k, At(False, at.b, i_g, 0), runs, sizes.S_k, 16, TILE)  # [1, W]
    b_dq = add(b_dq, scale(b_mean, -b_sum[:, None]))
    b_dq = keep(scale(b_dq, sm_scale), m_live[:, None])
    store_tokens(dq, at, o_n < n_rows, sizes.S_q, b_dq, BM, TILE)


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


@triton.jit(do_not_specialize=["sizes", "frames", "tiles", "group", "splits", "B"])
def frame_attention_bwd_kv_kernel(
    q, k, v, given, dk, dv, lengths, sizes, frames, tiles, group, splits, B, exponent, sm_scale, TILE: tl.constexpr
):
    """One program: gradients of a tile of BN keys of one sample and key/value head, over all queries that see them.

    given: Given. dk: as k, dv: as v, with splits (splits*B, ...) of partial sums. tiles: of keys, per sample and head.
    group: frames whose keys the same queries see. splits: programs that share a tile's queries. B: samples. sm_scale:
    its size. The others as frame_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    R: tl.constexpr = TILE.R
    ROW: tl.constexpr = TILE.ROW
    G = sizes.H // R
    i_tile = tl.program_id(0) % tiles
    i_split = tl.program_id(0) // tiles % splits
    i_bg = tl.program_id(0) // tiles // splits
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    at, n_rows, n_live, runs = key_tile(i_tile, i_b, i_g, lengths, sizes, frames, group, TILE)
    o_n = tl.arange(0, BN)
    m_live = o_n < n_live
    b_k = load_tokens(k, at, m_live, sizes.S_k, BN, TILE)  # [BN, W]
    b_v = load_tokens(v, at, m_live, sizes.S_k, BN, TILE)
    b_dk = filled(BN, 0.0, ROW)
    b_dv = filled(BN, 0.0, ROW)
    n_low, n_run, n_txt, n_left = walk(runs, BM)
    n_whole = n_low + n_run + n_txt
    for i in range(i_split, n_whole * R, splits):
        i_r = i // n_whole if R > 1 else 0
        is_text, first = whole_tile(i - i_r * n_whole, n_low, n_run, runs, BM)
        at_q = At(is_text, i_b, i_g * R + i_r, first)
        m = tl.full([BM], 1, tl.int1)
        queries, _ = _load_queries(q, given, at_q, m, sizes, frames, exponent, NO_LSE=float("inf"), TILE=TILE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    for i in range(i_split, n_left * R, splits):
        i_r = i // n_left if R > 1 else 0
        is_text, first, stop = left_tile(i - i_r * n_left, runs, BM)
        at_q = At(is_text, i_b, i_g * R + i_r, first)
        m = first + tl.arange(0, BM) < stop  # beyond: probability 0, by an infinite lse
        queries, _ = _load_queries(q, given, at_q, m, sizes, frames, exponent, NO_LSE=float("inf"), TILE=TILE)
        b_dk, b_dv = _to_keys((b_dk, b_dv), b_k, b_v, queries, exponent)
    b_dk = keep(scale(b_dk, sm_scale), m_live[:, None])
    b_dv = keep(b_dv, m_live[:, None])
    part = At(at.is_text, i_split * B + i_b, i_g, at.start)
    store_tokens(dk, part, o_n < n_rows, sizes.S_k, b_dk, BN, TILE)
    store_tokens(dv, part, o_n < n_rows, sizes.S_k, b_dv, BN, TILE)


def _row(D: int) -> Row:
    """One tile above 128 channels: a second one's operands leave no registers for two gradients."""
    return split_row(D) if D <= 128 else Row(D, D, power_of_2(D))


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None, row: Row, A: int) -> Tensor:
    """Of dout ``(B, N, H, D)``: ``(B, N, H)``, float32."""
    B, N, H, D = dout.shape
    delta = torch.empty(B, N, H, dtype=torch.float32, device=out.device)
    BN = max(2048 // power_of_2(D), 1)
    tensors: dict[str, Any] = {"p_o": out, "do": sequence_rows(dout, A), "p_dlse": dlse, "p_delta": delta}
    numbers: dict[str, Any] = {"N": N, "H": H, "count": B * N * H}
    launch(row_delta_kernel, cdiv(B * N * H, BN), like=out, config=DELTA, ROW=row, A=A, BN=BN, **tensors, **numbers)
    return delta


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
    return {"tiles": tiles, "group": group, "splits": splits, "B": B}


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
    **visible: Any,
) -> None:
    """Fills the gradients of what frame_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    B, G = q.shape[0], k.shape[3]
    # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
    q, words = with_positive_scale(q, text, sm_scale)
    dout = dout if dout.stride(1) < NEAR else dout.contiguous()
    arguments = frame_arguments(q, k, words, **visible)
    config = pick_for(KEYS, q)
    shares: dict[str, Any] = _shares(B, G, arguments["sizes"], arguments["frames"], config, text is not None)
    splits = shares["splits"]
    dq, dk, dv = gradients
    if splits > 1:
        dk, dv = (torch.empty(splits * B, *k.shape[1:], dtype=torch.float32, device=q.device) for _ in range(2))
    A = step(q, k, v, dout, *gradients, *(text or ()), *(text_gradients or ()), dk)
    dq_text, dk_text, dv_text = text_gradients or NO_TEXT
    sides = {name: token_pair(x, of_text, A) for name, x, of_text in zip("qkv", (q, k, v), words)}
    of_q, of_k, of_v = token_pair(dq, dq_text, A), token_pair(dk, dk_text, A), token_pair(dv, dv_text, A)
    row = _row(q.shape[4])
    given = Given(sequence_rows(dout, A), lse, _delta(out, dout, dlse, row, A))
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
    )
    shared: dict[str, Any] = {"like": q, **sides, "given": given, "exponent": base_2(sm_scale), **arguments}
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
    config = pick_for(QUERIES, q)
    programs, tiles = query_programs(B, arguments["sizes"], arguments["frames"], config.m)
    launch(
        frame_attention_bwd_q_kernel,
        programs,
        config=config,
        dq=of_q,
        p_dlse=dlse,
        tiles=tiles,
        sm_scale=sm_scale,
        TILE=tile._replace(BM=config.m, BN=config.n),
        **shared,
    )
