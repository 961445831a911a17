"""Attention of boxes of tokens, backward: delta, then the queries' gradient, then the keys' and values'.

As frame attention's: every gradient is summed by one program in a fixed order. The keys' programs walk through the
boxes of queries that see theirs: a mask's tables of that side, or the lists transposed.
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
    box_result,
    finite_rows,
    held_box,
    held_result,
    in_frame,
    is_in,
    key_sight,
    list_walk,
    listed_box,
    load_box,
    load_held,
    places,
    query_sight,
    row_flags,
    run_tile,
    steps_apart,
    store_held,
    window_box,
    window_sees,
    window_sight,
    window_walk,
)
from vdcore_kernels.core.frames import Frames
from vdcore_kernels.core.launch import launch, step
from vdcore_kernels.core.tile import add, column_sum, filled, keep, load_rows, scale, to
from vdcore_kernels.core.tokens import (
    NEAR,
    At,
    Sizes,
    load_keys,
    power,
    rows_times,
    sequence_rows,
    times_rows,
    token_pair,
    walk,
)
from vdcore_kernels.frame_attention.backward import (
    Queries,
    gradient_row,
    load_queries,
    mean_key,
    row_pairs,
)
from vdcore_kernels.frame_attention.forward import (
    FLOAT32,
    NO_TEXT,
    FrameConfig,
    Triple,
    base_2,
    pick_for,
    with_positive_scale,
)
from vdcore_kernels.tile_attention import plan
from vdcore_kernels.tile_attention.forward import NUMBERS, Problem, load_box_keys, walked_keys

QUERIES = (
    FrameConfig("interpreter", 4, 1, "several boxes in a small case", 32, 32, 128, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "64 keys spill where they are tested", 128, 32, 128),
    FrameConfig("sm_8|sm_11|sm_12", 8, 1, "0.49 instructions a pair for 0.98 of 64 queries", 128, 32, 64),
    FrameConfig("sm_8|sm_11|sm_12", 8, 1, "128 queries spill 72 bytes, 4 warps with text 112", 64, 32, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 128, 4),
)
# m: queries, walked through; n: keys, held.
KEYS = (
    FrameConfig("interpreter", 4, 1, "several boxes in a small case", 32, 32, 128, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "64 queries spill where they are tested", 32, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "two gradients of 128 rows take 128 registers: 32 queries spill", 16, 128, 128),
    FrameConfig("sm_89", 8, 1, "32 queries spill 8 bytes with text", 16, 128, 64),
    FrameConfig("sm_8|sm_11|sm_12", 8, 1, "0.56 instructions a pair for 1.12 of 64 keys", 32, 128, 64),
    FrameConfig("sm_8|sm_11|sm_12", 4, 1, "two tiles of 72 channels: 32 queries spill 80 bytes", 16, 64, 96),
    FrameConfig("sm_8|sm_11|sm_12", 8, 1, "128 keys spill 16 bytes", 32, 64, 128),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 128),
    FrameConfig("", 8, 1, FLOAT32, 16, 32, 64, 4),
    FrameConfig("", 4, 1, "of 32 keys of 128 channels 32 bytes spill", 16, 16, 128, 4),
)


class Sums(NamedTuple):
    """What queries' programs sum: the gradient [BM, W], but for the scale, and row sums [BM] of dS."""

    dq: Any
    ds: Any


@triton.jit
def _load_pairs(p_pairs, i_b, i_h, first, o, N, H, m):
    """lse and delta of rows o [BM] of the result from ``first`` on; 0 where m is false."""
    p_row = p_pairs + ((i_b * H + i_h) * N + first + o) * 2
    return tl.split(tl.load(p_row[:, None] + tl.arange(0, 2)[None, :], mask=m[:, None], other=0.0))


@triton.jit
def _load_do(do, i_b, i_h, first, o, m, TILE: tl.constexpr):
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    return load_rows(do.p + (i_b * do.b + i_h * do.h + first * do.s) * A, o * do.s * A, m, ROW)


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
def _runs_to_queries(sums, queries, k, v, i_b, i_g, runs, S, exponent, TILE: tl.constexpr):
    BN: tl.constexpr = TILE.BN
    n_low, n_run, n_txt, n_left = walk(runs, BN)
    for i in tl.range(n_low + n_run + n_txt + n_left, num_stages=1):
        is_text, first, stop = run_tile(i, n_low, n_run, n_txt, runs, BN)
        b_k, b_v, m = load_keys(k, v, At(is_text, i_b, i_g, first), stop, S, False, TILE)
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
    b_lse, b_delta = _load_pairs(p_pairs, held.b, held.h, first, o, N, H, m_live)
    b_do = _load_do(do, held.b, held.h, first, o, m_live, TILE)
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
            sums = _runs_to_queries(sums, queries, k, v, held.b, i_g, runs, S, exponent, TILE)
    # See frame attention's: what the row sums of dS lack tells by how much delta errs.
    tl.store(p_pairs + ((held.b * H + held.h) * N + first + o) * 2 + 1, queries.delta + sums.ds, mask=m_live)
    b_dq = add(sums.dq, scale(b_mean, -sums.ds[:, None]))
    if TILE.TEXT:  # those who see no box see runs
        b_mean = mean_key(k, At(False, held.b, i_g, 0), runs, S, 16, TILE)
        b_dq = add(b_dq, scale(b_mean, tl.where(n_seen > 0, 0.0, -sums.ds)[:, None]))
    store_held(dq, held, held.m, columns, keep(scale(b_dq, sm_scale), m_live[:, None]), BM, TILE)


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
    b_lse, b_delta = _load_pairs(p_pairs, i_b, i_h, first, o, T * S + L, H, m)
    m_rows = m
    if TESTED:
        is_finite = (b_lse + b_delta) * 0.0 == 0.0
        m_rows = m & is_finite
        b_lse = tl.where(is_finite, b_lse, float("nan"))
    b_q = load_box(q.video, i_b, i_h, box, walked.o_q, m_rows, TILE)
    b_do = _load_do(do, i_b, i_h, first, o, m_rows, TILE)
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
    n_low, n_run, n_txt, n_left = walk(runs, BM)
    for i in tl.range(n_low + n_run + n_txt + n_left, num_stages=1):
        is_text, first, stop = run_tile(i, n_low, n_run, n_txt, runs, BM)
        m = first + tl.arange(0, BM) < stop  # beyond: probability 0, by an infinite lse
        queries = load_queries(q, do, p_pairs, At(is_text, i_b, i_h, first), m, sizes, frames, float("inf"), TILE)
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


def tile_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Triple,
    text_gradients: Triple | None = None,
) -> None:
    """Fills the gradients of what tile_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    p = problem
    # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
    q, words = with_positive_scale(p.q, p.text, p.sm_scale)
    dout = dout if dout.stride(1) < NEAR else dout.contiguous()
    A = step(q, p.k, p.v, dout, *gradients, *(p.text or ()), *(text_gradients or ()))
    sides = {name: token_pair(x, of_text, A) for name, x, of_text in zip("qkv", (q, p.k, p.v), words)}
    filled_sides = [token_pair(x, of_text, A) for x, of_text in zip(gradients, text_gradients or NO_TEXT)]
    row, exponent = gradient_row(q.shape[4]), base_2(p.sm_scale)
    pairs = row_pairs(out, lse, dout, dlse, row=row, A=A, exponent=exponent)
    shared: dict[str, Any] = {**sides, "do": sequence_rows(dout, A), "p_pairs": pairs, "lengths": p.lengths}
    indices, counts = p.tiles or (None, None)
    listing, begin = transposed_lists(p)
    for first, end, mask in p.parts():
        config = pick_for(QUERIES, q)
        boxes = p.boxes(mask, of_keys=False, held=config.m, walked=config.n)
        every = [*sides.values(), *filled_sides]
        constants = p.constants(boxes, every, row=row, A=A, m=config.m, n=config.n, dout=dout)
        launch(
            tile_attention_bwd_q_kernel,
            config=config,
            dq=filled_sides[0],
            p_dlse=dlse,
            p_tiles=indices,
            p_counts=counts,
            exponent=exponent,
            sm_scale=p.sm_scale,
            TILE=constants,
            **p.programs(boxes, first, end, config.m),
            **p.numbers(mask, boxes),
            **shared,
        )
        config = pick_for(KEYS, q)
        boxes = p.boxes(mask, of_keys=True, held=config.n, walked=config.m)
        constants = p.constants(boxes, every, row=row, A=A, m=config.m, n=config.n, dout=dout)
        launch(
            tile_attention_bwd_kv_kernel,
            config=config,
            dk=filled_sides[1],
            dv=filled_sides[2],
            p_tiles=listing,
            p_begin=begin,
            exponent=exponent,
            sm_scale=abs(p.sm_scale),
            TILE=constants,
            **p.programs(boxes, first // constants.R, end // constants.R, config.n),
            **p.numbers(mask, boxes),
            **shared,
        )


def transposed_lists(p: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Of all lists which tiles list each one, and where these begin."""
    if p.tiles is None:
        return None, None
    indices, counts = p.tiles
    return plan.transposed(indices.flatten(0, 1), counts.flatten(0, 1))
