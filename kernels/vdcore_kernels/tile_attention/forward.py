"""Attention of boxes of tokens to boxes of tokens, forward: windows in frames, rows and columns, and listed tiles.

Bound by arithmetic, as frame attention, whose loop this is: what differs is where the rows of a tile are. Boxes that
all of the queries see come first and need no test; in the others coordinates are compared. Text is walked through last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.boxes import (
    Lists,
    Windows,
    box_places,
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
    steps_apart,
    window_box,
    window_sees,
    window_sight,
    window_walk,
)
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import LN_2, filled, keep, scale, split_row, store_rows
from vdcore_kernels.core.tokens import (
    key_head,
    load_keys,
    power,
    rows_times,
    times_rows,
    walk,
)
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, FrameConfig, pick_for
from vdcore_kernels.tile_attention.problem import BoxProblem

FORWARD = (
    FrameConfig("interpreter", 4, 1, "several boxes in a small case", 32, 32, 128, 4),
    FrameConfig("sm_9", 8, 3, "frame attention's: two warpgroups of 64 rows share the keys", 128, 64, 128),
    FrameConfig("sm_10", 8, 3, "64 keys spill where there is text", 128, 32, 128),
    FrameConfig(SMALL, 8, 2, "0.44 instructions a pair for 0.89 of 64 queries", 128, 32, 64),
    FrameConfig(SMALL, 8, 1, "two tiles of 72 channels: 2 stages spill up to 208 bytes", 128, 32, 96),
    FrameConfig(SMALL, 8, 1, "32 keys spill 360 bytes, of 64 queries with text 48", 128, 16, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 64, 32, 128),
    FrameConfig("", 8, 1, "frame attention's with twice the rows: of 16 of 64 channels 16 bytes spill", 32, 32, 64, 4),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4),
)

# Numbers of a call that kernels take by name; none is compiled in.
NUMBERS = (
    *("S", "L", "H", "first_head", "heads", "T", "T_k", "q_start", "boxes", "tiles"),
    *("held_rows", "held_columns", "walked_rows", "walked_columns"),
    *Windows._fields,
    *("list_b", "list_h", "n", "K"),
)


@triton.jit
def _attend(state, b_q, b_k, b_v, seen, flag, exponent, WHOLE: tl.constexpr):
    """Maximal score [BM], sum [BM] and result [BM, W] after a tile of keys: all of it with WHOLE, else what is seen [BM
    or 1, BN], with a flag [BN] that is added to its scores, or None."""
    b_m, b_l, b_o = state
    b_s = times_rows(b_q, b_k)  # [BM, BN]
    if not WHOLE:
        if flag is not None:
            b_s += flag[None, :]
        b_s = tl.where(seen, b_s, -float("inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_most = b_new
    if not WHOLE:  # a row may have seen nothing yet
        b_most = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = power(b_s, b_most[:, None], exponent)
    b_c = power(b_m, b_most, exponent)
    b_l = b_l * b_c + tl.sum(b_p, 1)
    b_o = rows_times(b_p.to(b_v[0].dtype), b_v, scale(b_o, b_c[:, None]))
    return b_new, b_l, b_o


class Walked(NamedTuple):
    """What a program walks through: the table of boxes, their Places, and these as steps of k and of v [BN]."""

    p: Any
    at: Any
    o_k: Any
    o_v: Any


@triton.jit
def walked_keys(k, v, p_walked, at, columns, TILE: tl.constexpr):
    o_k = steps_apart(k.video, at, columns, TILE.CLOSE)
    o_v = o_k
    if not TILE.SAME:
        o_v = steps_apart(v.video, at, columns, TILE.CLOSE)
    return Walked(p_walked, at, o_k, o_v)


@triton.jit
def load_box_keys(k, v, i_b, i_g, box, walked, m, TILE: tl.constexpr):
    """Keys and values [BN, W] of a box, of which there are m [BN]."""
    return load_box(k.video, i_b, i_g, box, walked.o_k, m, TILE), load_box(v.video, i_b, i_g, box, walked.o_v, m, TILE)


@triton.jit
def _over_lists(state, b_q, k, v, held, i_g, lists, walked, exponent, TILE: tl.constexpr):
    """State after the tiles that are listed for a held box, and how many boxes they are."""
    p_list, n_seen = list_walk(lists, held.b, held.h, held.i // TILE.HELD_PARTS, TILE)
    for i in range(n_seen):
        box = listed_box(p_list, walked.p, i, TILE)
        m = tl.full([TILE.BN], 1, tl.int1) if TILE.EVEN else is_in(box, walked.at)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m, TILE)
        state = _attend(state, b_q, b_k, b_v, m[None, :], None, exponent, WHOLE=TILE.EVEN)
    return state, n_seen


@triton.jit
def _over_windows(state, b_q, k, v, held, i_g, walked, windows, until, exponent, TILE: tl.constexpr):
    """State after the boxes that a held one sees of frames before ``until``, and how many they are."""
    begin, n_whole, tested, n_tested = window_walk(held, walked.p, until, TILE)
    m, place = tl.full([TILE.BN], 1, tl.int1), box_places(walked.at)
    for i in range(n_whole):
        box, _, _ = window_box(walked.p, begin + i)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m, TILE)
        state = _attend(state, b_q, b_k, b_v, None, None, exponent, WHOLE=True)
    for i in range(n_tested):
        box, row_radius, column_radius = window_box(walked.p, tested + i)
        m = in_frame(box, place, windows)
        b_k, b_v = load_box_keys(k, v, held.b, i_g, box, walked, m, TILE)
        first, last = window_sight(held.box, held.at, box, row_radius, column_radius, windows, OF_KEYS=False)
        seen = window_sees(first[:, None], last[:, None], place[None, :])
        # A row that is not finite is NaN in the scores of those who see it, and 0, not 0 * NaN, for the others.
        flag = row_flags(b_v)
        b_v = load_box(v.video, held.b, i_g, box, walked.o_v, m & (flag == 0.0), TILE)
        state = _attend(state, b_q, b_k, b_v, seen, flag, exponent, WHOLE=False)
    return state, n_whole + n_tested


@triton.jit
def _over_runs(state, b_q, k, v, of_keys, runs, S, exponent, TILE: tl.constexpr):
    """State after runs of the video and of the text, and how many tiles they are."""
    BN: tl.constexpr = TILE.BN
    steps = walk(runs, BN)
    n_tiles = steps.n_whole + steps.n_left
    for i in tl.range(n_tiles, num_stages=1):  # few: stages would take registers of the other loops
        at, stop = run_tile(i, of_keys, steps, BN)
        b_k, b_v, m = load_keys(k, v, at, stop, S, False, TILE)
        state = _attend(state, b_q, b_k, b_v, m[None, :], None, exponent, WHOLE=False)
    return state, n_tiles


@triton.jit(do_not_specialize=NUMBERS)
def tile_attention_fwd_kernel(
    q,
    k,
    v,
    p_o,
    p_lse,
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
    TILE: tl.constexpr,
):
    """One program: a box of BM queries, or a tile of text, of one sample and head, and all keys that they see.

    q, k, v: Pair (B, T, S, heads, D), (B, L, heads, D). p_o: (B, N, H, D), contiguous, its rows where held_result says.
    p_lse: (B, N, H), or None. p_held, p_walked: of plan.Boxes. p_tiles, p_counts: with LISTS, int32 (lists, n, K) and
    (lists, n); list_b, list_h: lists from one sample and head to the next. first_head, heads: query heads that the
    boxes are for. boxes: of queries; tiles: with those of text. exponent: size of the scale of the scores, times log2
    e, above 0. The others are those of core.boxes.Windows and core.frames.Frames.
    """
    BM: tl.constexpr = TILE.BM
    ROW: tl.constexpr = TILE.ROW
    windows = Windows(rows, columns, tile_rows, tile_columns, by_rows, by_columns, n_rows, n_columns, shift)
    held = held_box(p_held, tiles, boxes, first_head, heads, held_rows, held_columns, L, BM, TILE)
    i_g = held.h // TILE.R
    at_k = places(walked_rows, walked_columns, TILE.BN)
    walked = walked_keys(k, v, p_walked, at_k, columns, TILE)
    m_live, until, runs = query_sight(held, lengths, S, L, T, T_k, q_start, TILE)
    b_q = load_held(q, held, m_live, columns, BM, TILE)  # [BM, W]
    state = (tl.full([BM], -float("inf"), tl.float32), tl.full([BM], 0.0, tl.float32), filled(BM, 0.0, ROW))
    if TILE.LISTS:
        lists = Lists(p_tiles, p_counts, None, list_b, list_h, n, K)
        state, n_seen = _over_lists(state, b_q, k, v, held, i_g, lists, walked, exponent, TILE)
    else:
        state, n_seen = _over_windows(state, b_q, k, v, held, i_g, walked, windows, until, exponent, TILE)
    if TILE.TEXT:
        state, n_read = _over_runs(state, b_q, k, v, key_head(held, TILE), runs, S, exponent, TILE)
        n_seen += n_read
    b_m, b_l, b_o = state
    m_seeing = m_live & (n_seen > 0)
    b_o = keep(scale(b_o, (1 / b_l)[:, None]), m_seeing[:, None])
    first, o, N = held_result(held, S, T, L, columns, BM, TILE)
    row = (held.b * N + first) * H + held.h
    store_rows(p_o + row * ROW.D, o * (H * ROW.D), held.m, b_o, ROW)
    if p_lse is not None:
        b_lse = tl.where(m_seeing, b_m * (exponent * LN_2) + tl.log(b_l), -float("inf"))
        tl.store(p_lse + row + o * H, b_lse, mask=held.m)


def tile_forward(problem: BoxProblem, out: Tensor, lse: Tensor | None) -> None:
    """Fills out ``(B, T*S + L, H, D)`` and lse ``(B, T*S + L, H)``."""
    p = problem.with_positive_scores()
    config = pick_for(FORWARD, p.q)
    layout = p.layout()
    tile = p.constants(layout, config, split_row(p.q.shape[4]))
    indices, counts = p.tiles or (None, None)
    for first, end, mask in p.parts():
        boxes = p.boxes(mask, of_keys=False, held=config.m, walked=config.n)
        launch(
            tile_attention_fwd_kernel,
            config=config,
            q=layout.pairs[0],
            k=layout.pairs[1],
            v=layout.pairs[2],
            p_o=out,
            p_lse=lse,
            p_tiles=indices,
            p_counts=counts,
            TILE=p.box_constants(boxes, layout.pairs, tile),
            **p.programs(boxes, first, end, config.m),
            **p.numbers(mask, boxes),
        )
