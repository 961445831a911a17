"""Backward: the gradients of a box of keys and of their values, which walks through the boxes of queries that see them:
a mask's tables of that side, or the lists transposed.
"""

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
    box_result,
    held_box,
    in_frame,
    is_in,
    key_sight,
    list_walk,
    listed_box,
    load_box,
    load_held,
    places,
    run_tile,
    steps_apart,
    store_held,
    window_box,
    window_sees,
    window_sight,
    window_walk,
)
from vdcore_kernels.core.frames import Frames
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import filled, keep, scale
from vdcore_kernels.core.tokens import At, Sizes, power, rows_times, times_rows, walk
from vdcore_kernels.frame_attention.backward_rows import Given, Queries, load_queries
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, FrameConfig, pick_for
from vdcore_kernels.tile_attention import plan
from vdcore_kernels.tile_attention.backward_rows import load_box_do, load_box_pairs
from vdcore_kernels.tile_attention.forward import NUMBERS
from vdcore_kernels.tile_attention.problem import BoxProblem

# m: queries, walked through; n: keys, held.
KEYS = (
    FrameConfig("interpreter", 4, 1, "several boxes in a small case", 32, 32, 128, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "64 queries spill where they are tested", 32, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "two gradients of 128 rows take 128 registers: 32 queries spill", 16, 128, 128),
    FrameConfig("sm_89", 8, 1, "32 queries spill 8 bytes with text", 16, 128, 64),
    FrameConfig(SMALL, 8, 1, "0.56 instructions a pair for 1.12 of 64 keys", 32, 128, 64),
    FrameConfig(SMALL, 4, 1, "two tiles of 72 channels: 32 queries spill 80 bytes", 16, 64, 96),
    FrameConfig(SMALL, 8, 1, "0.9 instructions a pair for 1.4 of 32 queries, whose products warps repeat", 64, 64, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 64, 4),
    FrameConfig("", 4, 1, "of 32 keys of 128 channels 32 bytes spill", 16, 16, 128, 4),
)


class Gradients(NamedTuple):
    """What keys' programs sum: gradients of keys, but for the scale, and of values [BN, W]."""

    dk: Any
    dv: Any


@triton.jit
def _to_keys(sums, b_k, b_v, queries, seen, exponent, WHOLE: tl.constexpr):
    """Sums after a tile of queries: all of it with WHOLE, else those that see [BN, BM]."""
    b_p = power(times_rows(b_k, queries.q), queries.lse[None, :], exponent)  # [BN, BM]
    b_ds = b_p * (times_rows(b_v, queries.do) - queries.delta[None, :])
    if not WHOLE:
        b_p, b_ds = tl.where(seen, b_p, 0.0), tl.where(seen, b_ds, 0.0)
    b_dv = rows_times(b_p.to(queries.do[0].dtype), queries.do, sums.dv)
    return Gradients(rows_times(b_ds.to(queries.q[0].dtype), queries.q, sums.dk), b_dv)


class Side(NamedTuple):
    """What keys' programs walk through: the table of boxes of queries, their Places, and these as steps of q [BM]."""

    p: Any
    at: Any
    o_q: Any


@triton.jit
def _box_queries(q, do, p_pairs, i_b, i_h, box, walked, m, grid, TESTED: tl.constexpr, TILE: tl.constexpr):
    """Queries of a walked box, of which there are m [BM], the others with an infinite lse; grid: S, T, L, H, columns.

    TESTED: not all of them see all keys. A row that is not finite shows in lse or, where it is of dout, in delta: who
    does not see a key must not reach it, not even as 0 * NaN, so the row is 0; and lse NaN reaches those that it sees.
    """
    S, T, L, H, columns = grid
    first, o = box_result(box, walked.at, S, L, columns, TILE)
    b_lse, b_delta = load_box_pairs(p_pairs, i_b, i_h, first, o, T * S + L, H, m)
    m_rows = m
    if TESTED:
        is_finite = (b_lse + b_delta) * 0.0 == 0.0
        m_rows = m & is_finite
        b_lse = tl.where(is_finite, b_lse, float("nan"))
    b_q = load_box(q.video, i_b, i_h, box, walked.o_q, m_rows, TILE)
    b_do = load_box_do(do, i_b, i_h, first, o, m_rows, TILE)
    return Queries(b_q, b_do, tl.where(m, b_lse, float("inf")), b_delta)


@triton.jit
def _lists_to_keys(sums, b_k, b_v, q, do, p_pairs, held, i_h, lists, walked, grid, exponent, TILE: tl.constexpr):
    """Sums after the tiles that list a held box's, for one head of the queries."""
    p_list, n_seeing = list_walk(lists, held.b, i_h, held.i // TILE.HELD_PARTS, TILE)
    for i in range(n_seeing):
        box = listed_box(p_list, walked.p, i, TILE)
        m = tl.full([TILE.BM], 1, tl.int1) if TILE.EVEN else is_in(box, walked.at)
        queries = _box_queries(q, do, p_pairs, held.b, i_h, box, walked, m, grid, False, TILE)
        sums = _to_keys(sums, b_k, b_v, queries, None, exponent, WHOLE=True)  # beyond m lse is infinite
    return sums


@triton.jit
def _windows_to_keys(
    sums, b_k, b_v, q, do, p_pairs, held, i_h, seeing, walked, windows, grid, exponent, TILE: tl.constexpr
):
    """Sums after the boxes of queries that see a held one, for one head of the queries; seeing: their window_walk."""
    begin, n_whole, tested, n_tested = seeing
    m, place = tl.full([TILE.BM], 1, tl.int1), box_places(walked.at)
    for i in range(n_whole):
        box, _, _ = window_box(walked.p, begin + i)
        queries = _box_queries(q, do, p_pairs, held.b, i_h, box, walked, m, grid, False, TILE)
        sums = _to_keys(sums, b_k, b_v, queries, None, exponent, WHOLE=True)
    for i in range(n_tested):
        box, row_radius, column_radius = window_box(walked.p, tested + i)
        m_q = in_frame(box, place, windows)
        queries = _box_queries(q, do, p_pairs, held.b, i_h, box, walked, m_q, grid, True, TILE)
        first, last = window_sight(held.box, held.at, box, row_radius, column_radius, windows, OF_KEYS=True)
        seen = window_sees(first[:, None], last[:, None], place[None, :])
        sums = _to_keys(sums, b_k, b_v, queries, seen, exponent, WHOLE=False)
    return sums


@triton.jit
def _runs_to_keys(sums, b_k, b_v, q, do, p_pairs, i_b, i_h, runs, grid, exponent, TILE: tl.constexpr):
    """Sums after runs of the video's queries and of the text's."""
    BM: tl.constexpr = TILE.BM
    S, T, L, H, _ = grid
    sizes, frames = Sizes(S, S, L, H), Frames(T, T, 0, -1, -1, 1, 0, 1)
    steps = walk(runs, BM)
    for i in tl.range(steps.n_whole + steps.n_left, num_stages=1):
        at, stop = run_tile(i, At(False, i_b, i_h, 0), steps, BM)
        m = at.start + tl.arange(0, BM) < stop  # beyond: probability 0, by an infinite lse
        queries = load_queries(q, do, p_pairs, at, m, sizes, frames, float("inf"), TILE)
        sums = _to_keys(sums, b_k, b_v, queries, None, exponent, WHOLE=True)
    return sums


@triton.jit(do_not_specialize=NUMBERS)
def tile_attention_bwd_kv_kernel(
    q,
    k,
    v,
    do,
    p_pairs,
    dk,
    dv,
    lengths,
    p_held,
    p_walked,
    p_tiles,
    p_begin,
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
    """One program: gradients of a box of BN keys, or of a tile of text, of one sample and key/value head, over all
    queries that see them.

    do, p_pairs: as tile_attention_bwd_q_kernel's. dk: as k, dv: as v. p_held, p_walked: of plan.Boxes of keys. p_tiles,
    p_begin: with LISTS, the lists transposed. first_head, heads, boxes, tiles: of keys. sm_scale: its size. The others
    as tile_attention_fwd_kernel's.
    """
    BN: tl.constexpr = TILE.BN
    ROW: tl.constexpr = TILE.ROW
    windows = Windows(rows, columns, tile_rows, tile_columns, by_rows, by_columns, n_rows, n_columns, shift)
    grid = (S, T, L, H, columns)
    held = held_box(p_held, tiles, boxes, first_head, heads, held_rows, held_columns, L, BN, TILE)
    at_q = places(walked_rows, walked_columns, TILE.BM)
    walked = Side(p_walked, at_q, steps_apart(q.video, at_q, columns, TILE.CLOSE))
    m_live, until, runs = key_sight(held, lengths, S, L, T, T_k, q_start, TILE)
    b_k = load_held(k, held, m_live, columns, BN, TILE)  # [BN, W]
    b_v = load_held(v, held, m_live, columns, BN, TILE)
    sums = Gradients(filled(BN, 0.0, ROW), filled(BN, 0.0, ROW))
    for i_r in range(TILE.R):
        i_h = held.h * TILE.R + i_r
        if TILE.LISTS:
            lists = Lists(p_tiles, None, p_begin, list_b, list_h, n, K)
            sums = _lists_to_keys(sums, b_k, b_v, q, do, p_pairs, held, i_h, lists, walked, grid, exponent, TILE)
        else:
            seeing = window_walk(held, p_walked, until, TILE)
            sums = _windows_to_keys(
                sums, b_k, b_v, q, do, p_pairs, held, i_h, seeing, walked, windows, grid, exponent, TILE
            )
            if TILE.TEXT:
                sums = _runs_to_keys(sums, b_k, b_v, q, do, p_pairs, held.b, i_h, runs, grid, exponent, TILE)
    store_held(dk, held, held.m, columns, keep(scale(sums.dk, sm_scale), m_live[:, None]), BN, TILE)
    store_held(dv, held, held.m, columns, keep(sums.dv, m_live[:, None]), BN, TILE)


def launch_keys(
    p: BoxProblem,
    given: Given,
    heads: tuple[int, int],
    mask: GridMask | None,
    listing: tuple[Tensor | None, Tensor | None],
) -> None:
    """Fills the gradients of k and v that heads [first, end) of q see under the mask; listing: transposed_lists."""
    config, R = pick_for(KEYS, p.q), p.q.shape[3] // p.k.shape[3]
    boxes = p.boxes(mask, of_keys=True, held=config.n, walked=config.m)
    tile = p.constants(given.layout, config, given.row)
    launch(
        tile_attention_bwd_kv_kernel,
        config=config,
        dk=given.layout.pairs[4],
        dv=given.layout.pairs[5],
        p_tiles=listing[0],
        p_begin=listing[1],
        sm_scale=abs(p.sm_scale),
        TILE=p.box_constants(boxes, given.layout.pairs, tile, given.dout),
        **given.tensors(),
        **p.programs(boxes, heads[0] // R, heads[1] // R, config.n),
        **p.numbers(mask, boxes),
    )


def transposed_lists(p: BoxProblem) -> tuple[Tensor | None, Tensor | None]:
    """Of all lists which tiles list each one, and where these begin."""
    if p.tiles is None:
        return None, None
    indices, counts = p.tiles
    return plan.transposed(indices.flatten(0, 1), counts.flatten(0, 1))
