"""Backward: the gradient of a box of queries, which walks through its keys as forward does."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore.grid_mask import GridMask
from vdcore_kernels.core.boxes import (
    Lists,
    Windows,
    box_places,
    finite_rows,
    held_box,
    held_result,
    in_frame,
    is_in,
    list_walk,
    listed_box,
    load_box,
    load_held,
    places,
    query_sight,
    row_flags,
    run_tile,
    store_held,
    window_box,
    window_sees,
    window_sight,
    window_walk,
)
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import add, column_sum, filled, keep, scale, to
from vdcore_kernels.core.tokens import key_head, load_keys, power, rows_times, times_rows, walk
from vdcore_kernels.frame_attention.backward_queries import mean_key
from vdcore_kernels.frame_attention.backward_rows import Given, Queries
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, FrameConfig, pick_for
from vdcore_kernels.tile_attention.backward_rows import load_box_do, load_box_pairs
from vdcore_kernels.tile_attention.forward import NUMBERS, load_box_keys, walked_keys
from vdcore_kernels.tile_attention.problem import BoxProblem

QUERIES = (
    FrameConfig("interpreter", 4, 1, "several boxes in a small case", 32, 32, 128, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "64 keys spill where they are tested", 128, 32, 128),
    FrameConfig(SMALL, 8, 1, "0.5 instructions a pair: warps repeat none of 128 queries' products", 128, 32, 64),
    FrameConfig("sm_8", 8, 1, "the same, two tiles of 72 channels", 128, 32, 96),
    FrameConfig("sm_11|sm_12", 4, 1, "two tiles of 72 channels: 128 queries spill 16 bytes", 64, 16, 96),
    FrameConfig(SMALL, 8, 1, "1.0 instructions a pair for 1.6 of 32 keys, whose products warps repeat", 64, 64, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4),
)


class Sums(NamedTuple):
    """What queries' programs sum: the gradient [BM, W], but for the scale, and row sums [BM] of dS."""

    dq: Any
    ds: Any


@triton.jit
def _to_queries(sums, queries, b_k, b_v, seen, finite_k, exponent, WHOLE: tl.constexpr):
    """Sums after a tile of keys: all of it with WHOLE, else what is seen [BM or 1, BN]; finite_k: the keys, 0 where
    they are not finite and not all see them."""
    b_p = power(times_rows(queries.q, b_k), queries.lse[:, None], exponent)  # [BM, BN]
    b_ds = b_p * (times_rows(queries.do, b_v) - queries.delta[:, None])
    if not WHOLE:
        b_ds = tl.where(seen, b_ds, 0.0)
    b_ds = b_ds.to(b_k[0].dtype)
    return Sums(rows_times(b_ds, finite_k, sums.dq), sums.ds + tl.sum(b_ds.to(tl.float32), 1))


@triton.jit
def _runs_to_queries(sums, queries, k, v, of_keys, runs, S, exponent, TILE: tl.constexpr):
    BN: tl.constexpr = TILE.BN
    steps = walk(runs, BN)
    for i in tl.range(steps.n_whole + steps.n_left, num_stages=1):
        at, stop = run_tile(i, of_keys, steps, BN)
        b_k, b_v, m = load_keys(k, v, at, stop, S, False, TILE)
        sums = _to_queries(sums, queries, b_k, b_v, m[None, :], b_k, exponent, WHOLE=False)
    return sums


@triton.jit
def _seen_mean(k, i_b, i_g, box, walked, seen, m, TILE: tl.constexpr):
    """Of a box, of which there are m [BN], the mean [BM, W] of the keys that each query sees [BM, BN], 0 of none."""
    ROW: tl.constexpr = TILE.ROW
    b_k = finite_rows(load_box(k.video, i_b, i_g, box, walked.o_k, m, TILE))
    total = rows_times(seen.to(b_k[0].dtype), b_k, filled(TILE.BM, 0.0, ROW))
    return scale(total, (1.0 / tl.maximum(tl.sum(seen.to(tl.float32), 1), 1.0))[:, None])


@triton.jit
def _lists_to_queries(sums, queries, k, v, held, i_g, lists, walked, exponent, TILE: tl.constexpr):
    """Sums after the listed tiles, the mean of the keys of their first box, and how many boxes there are."""
    ROW: tl.constexpr = TILE.ROW
    p_list, n_seen = list_walk(lists, held.b, held.h, held.i // TILE.HELD_PARTS, TILE)
    for i in range(n_seen):
        box = listed_box(p_list, walked.p, i, TILE)
        m = tl.full([TILE.BN], 1, tl.int1) if TILE.EVEN else is_in(box, walked.at)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m, TILE)
        sums = _to_queries(sums, queries, b_k, b_v, m[None, :], b_k, exponent, WHOLE=TILE.EVEN)
    b_mean = filled(1, 0.0, ROW)
    if n_seen > 0:
        box = listed_box(p_list, walked.p, 0, TILE)
        m = is_in(box, walked.at)
        b_k = load_box(k.video, held.b, i_g, box, walked.o_k, m, TILE)
        b_mean = scale(column_sum(to(b_k, tl.float32)), 1.0 / tl.sum(m.to(tl.int32), 0))
    return sums, b_mean, n_seen


@triton.jit
def _windows_to_queries(sums, queries, k, v, held, i_g, seen, exponent, TILE: tl.constexpr):
    """The same after the boxes that a held one sees of frames before a last one; seen: Walked, Windows, that frame."""
    walked, windows, until = seen
    ROW: tl.constexpr = TILE.ROW
    begin, n_whole, tested, n_tested = window_walk(held, walked.p, until, TILE)
    m, place = tl.full([TILE.BN], 1, tl.int1), box_places(walked.at)
    for i in range(n_whole):
        box, _, _ = window_box(walked.p, begin + i)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m, TILE)
        sums = _to_queries(sums, queries, b_k, b_v, None, b_k, exponent, WHOLE=True)
    for i in range(n_tested):
        box, row_radius, column_radius = window_box(walked.p, tested + i)
        m_k = in_frame(box, place, windows)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m_k, TILE)
        first, last = window_sight(held.box, held.at, box, row_radius, column_radius, windows, OF_KEYS=False)
        m_seen = window_sees(first[:, None], last[:, None], place[None, :])
        # A row that is not finite shows in lse of those who see it, and is 0, not 0 * NaN, for the others.
        b_sum = load_box(k.video, held.b, i_g, box, walked.o_k, m_k & (row_flags(b_k) == 0.0), TILE)
        sums = _to_queries(sums, queries, b_k, b_v, m_seen, b_sum, exponent, WHOLE=False)
    b_mean = filled(TILE.BM, 0.0, ROW)
    if n_whole + n_tested > 0:
        box, row_radius, column_radius = window_box(walked.p, tl.where(n_whole > 0, begin, tested))
        first, last = window_sight(held.box, held.at, box, row_radius, column_radius, windows, OF_KEYS=False)
        m_seen = window_sees(first[:, None], last[:, None], place[None, :])
        b_mean = _seen_mean(k, held.b, i_g, box, walked, m_seen, in_frame(box, place, windows), TILE)
    return sums, b_mean, n_whole + n_tested


@triton.jit(do_not_specialize=NUMBERS)
def tile_attention_bwd_q_kernel(
    q,
    k,
    v,
    do,
    p_pairs,
    dq,
    p_dlse,
    lengths,
    p_held,
    p_walked,
    p_tiles,
    p_counts,
    S,
    L,
    H,
    first_head,
    heads,
    T,
    T_k,
    q_start,
    boxes,
    tiles,
    held_rows,
    held_columns,
    walked_rows,
    walked_columns,
    rows,
    columns,
    tile_rows,
    tile_columns,
    by_rows,
    by_columns,
    n_rows,
    n_columns,
    shift,
    list_b,
    list_h,
    n,
    K,
    exponent,
    sm_scale,
    TILE: tl.constexpr,
):
    """One program: the gradient of a box of BM queries, or of a tile of text, of one sample and head.

    do: Rows (B, N, H, D), t unused. p_pairs: (B, H, N, 2), of row_delta_kernel: delta becomes what makes a row of dS
    add up to dlse. dq: as q. p_dlse: (B, N, H), or None. The others as tile_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    ROW: tl.constexpr = TILE.ROW
    windows = Windows(rows, columns, tile_rows, tile_columns, by_rows, by_columns, n_rows, n_columns, shift)
    held = held_box(p_held, tiles, boxes, first_head, heads, held_rows, held_columns, L, BM, TILE)
    i_g = held.h // TILE.R
    at_k = places(walked_rows, walked_columns, TILE.BN)
    walked = walked_keys(k, v, p_walked, at_k, columns, TILE)
    m_live, until, runs = query_sight(held, lengths, S, L, T, T_k, q_start, TILE)
    first, o, N = held_result(held, S, T, L, columns, BM, TILE)
    b_lse, b_delta = load_box_pairs(p_pairs, held.b, held.h, first, o, N, H, m_live)
    b_do = load_box_do(do, held.b, held.h, first, o, m_live, TILE)
    queries = Queries(load_held(q, held, m_live, columns, BM, TILE), b_do, b_lse, b_delta)
    b_sum = tl.full([BM], 0.0, tl.float32)
    if p_dlse is not None:
        b_sum -= tl.load(p_dlse + (held.b * N + first) * H + held.h + o * H, mask=m_live, other=0.0)
    sums = Sums(filled(BM, 0.0, ROW), b_sum)
    if TILE.LISTS:
        lists = Lists(p_tiles, p_counts, None, list_b, list_h, n, K)
        sums, b_mean, _ = _lists_to_queries(sums, queries, k, v, held, i_g, lists, walked, exponent, TILE)
    else:
        seen = (walked, windows, until)
        sums, b_mean, n_seen = _windows_to_queries(sums, queries, k, v, held, i_g, seen, exponent, TILE)
        if TILE.TEXT:
            sums = _runs_to_queries(sums, queries, k, v, key_head(held, TILE), runs, S, exponent, TILE)
    # See frame attention's: what the row sums of dS lack tells by how much delta errs.
    tl.store(p_pairs + ((held.b * H + held.h) * N + first + o) * 2 + 1, queries.delta + sums.ds, mask=m_live)
    b_dq = add(sums.dq, scale(b_mean, -sums.ds[:, None]))
    if TILE.TEXT:  # those who see no box see runs
        b_mean = mean_key(k, key_head(held, TILE), runs, S, 16, TILE)
        b_dq = add(b_dq, scale(b_mean, tl.where(n_seen > 0, 0.0, -sums.ds)[:, None]))
    store_held(dq, held, held.m, columns, keep(scale(b_dq, sm_scale), m_live[:, None]), BM, TILE)


def launch_queries(
    p: BoxProblem, given: Given, heads: tuple[int, int], mask: GridMask | None, dlse: Tensor | None
) -> None:
    """Fills the gradient of q, of heads [first, end) under the mask."""
    config = pick_for(QUERIES, p.q)
    boxes = p.boxes(mask, of_keys=False, held=config.m, walked=config.n)
    indices, counts = p.tiles or (None, None)
    tile = p.constants(given.layout, config, given.row)
    launch(
        tile_attention_bwd_q_kernel,
        config=config,
        dq=given.layout.pairs[3],
        p_dlse=dlse,
        p_tiles=indices,
        p_counts=counts,
        sm_scale=p.sm_scale,
        TILE=p.box_constants(boxes, given.layout.pairs, tile, given.dout),
        **given.tensors(),
        **p.programs(boxes, *heads, config.m),
        **p.numbers(mask, boxes),
    )
