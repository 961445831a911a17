"""Boxes of tokens: what the kernels of windows and of listed tiles share.

A program holds a box and walks through boxes of the other side (tile_attention/plan.py makes their tables). The places
of a box lie at the same distances from its first token wherever it is, so they are counted once, and a walked box costs
the few numbers of its table beside its rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vdcore_kernels.core.frames import Frames, valid_frames
from vdcore_kernels.core.tile import load_rows, store_rows
from vdcore_kernels.core.tokens import At, Runs, either_pointer, left_tile, text_length, valid_key_frames, whole_tile

# Words of a held and of a walked box.
HELD = tl.constexpr(8)
WALKED = tl.constexpr(4)


class BoxTile(NamedTuple):
    """Constants of kernels over boxes: those of core.tokens.Tile, and more.

    Args:
        LISTS: boxes of listed tiles, else those of windows.
        EVEN: of listed tiles: every place of a walked box is a token.
        HELD_PARTS, WALKED_PARTS: boxes that a listed tile is made of.
        CUT: frames have lengths.
        SAME: k and v have the same strides.
        CLOSE: places of a box are so close that 32 bits count what lies between them.
    """

    ROW: Any
    A: int
    R: int
    BM: int
    BN: int
    FLAT: bool
    TEXT: bool
    TEXT_FIRST: bool
    TEXT_SEES: bool
    AMD: int
    LISTS: bool
    EVEN: bool
    HELD_PARTS: int
    WALKED_PARTS: int
    CUT: bool
    SAME: bool
    CLOSE: bool


class Windows(NamedTuple):
    """How far a radius reaches: tokens of an axis, tokens of a tile and 1 over that, tiles of an axis; and whether
    windows move inwards at borders (1 or 0)."""

    rows: Any
    columns: Any
    tile_rows: Any
    tile_columns: Any
    by_rows: Any
    by_columns: Any
    n_rows: Any
    n_columns: Any
    shift: Any


class Lists(NamedTuple):
    """Listed tiles: int32 (lists, n, K) and their counts (lists, n), or where they begin (lists, n + 1), counts None;
    strides of a batch and of a head in lists.
    """

    tiles: Any
    counts: Any
    begin: Any
    b: Any
    h: Any
    n: Any
    K: Any


class Box(NamedTuple):
    """Frame and first token in it of a box, and how many of its frames, rows and columns there are, a byte each."""

    frame: Any
    first: Any
    extent: Any


class Places(NamedTuple):
    """Frames, rows and columns [N] of a box's places, counted from its first."""

    frame: Any
    row: Any
    column: Any


# Coordinates are compared side by side in one number: where the difference of two parts is not negative, its high bit
# stays. Parts are bytes, below 128, or halves, which a grid of less than 2**13 rows and columns never leaves.
BYTES = tl.constexpr(0x808080)
HALVES = tl.constexpr(-0x7FFF8000)  # 0x80008000


@triton.jit
def places(rows, columns, N: tl.constexpr):
    """Of a box of so many rows and columns."""
    o = tl.arange(0, N)
    return Places(o // (rows * columns), o // columns % rows, o % columns)


@triton.jit
def tokens_apart(at, S, columns):
    """[N]: how many tokens places are after the first."""
    return at.frame * S + at.row * columns + at.column


@triton.jit
def steps_apart(x, at, columns, CLOSE: tl.constexpr):
    """[N]: how far places of Rows x are from the first, in steps."""
    frame, token = at.frame, at.row * columns + at.column
    if not CLOSE:
        frame, token = frame.to(tl.int64), token.to(tl.int64)
    return frame * x.t + token * x.s


@triton.jit
def read_box(p):
    """A box of a table, of which p is the first number."""
    return Box(tl.load(p), tl.load(p + 1), tl.load(p + 2))


@triton.jit
def is_in(box, at):
    """[N]: which places of a box are tokens."""
    place = at.frame + (at.row << 8) + (at.column << 16) + BYTES
    return ((box.extent + 0xFFFFFF - place) & BYTES) == BYTES


@triton.jit
def first_row(x, i_b, i_h, box, A: tl.constexpr):
    """Pointer to the first row of a box of Rows x."""
    steps = i_b * x.b + i_h * x.h + box.frame.to(tl.int64) * x.t + box.first.to(tl.int64) * x.s
    return x.p + steps * A


@triton.jit
def load_box(x, i_b, i_h, box, o, m, TILE: tl.constexpr):
    """Rows [N, W] of a box, o [N] steps from its first; 0 where m is false."""
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    return load_rows(first_row(x, i_b, i_h, box, A), o * A, m, ROW)


class Held(NamedTuple):
    """The box, or the tile of text, that a program holds.

    Args:
        i: which of the boxes.
        p: its numbers.
        start: of text: its first token.
        at: its Places.
        m: [N]: which of its rows there are.
    """

    is_text: Any
    b: Any
    h: Any
    i: Any
    p: Any
    box: Any
    start: Any
    at: Any
    m: Any


@triton.jit
def held_box(p_held, tiles, boxes, first_head, heads, rows, columns, L, N: tl.constexpr, TILE: tl.constexpr):
    """The program's: boxes of a sample and head, the last one first, then text."""
    i_bh = tl.program_id(0) // tiles
    # The last frames of a causal mask see the most, and text sees all: they go first.
    i = tiles - 1 - tl.program_id(0) % tiles
    p = p_held + tl.minimum(i, boxes - 1).to(tl.int64) * HELD
    box = read_box(p)
    at = places(rows, columns, N)
    m = is_in(box, at)
    is_text = i < 0
    start = (i - boxes) * N
    if TILE.TEXT:
        is_text = i >= boxes
        m = tl.where(is_text, start + tl.arange(0, N) < L, m)
    i_b, i_h = (i_bh // heads).to(tl.int64), (first_head + i_bh % heads).to(tl.int64)
    return Held(is_text, i_b, i_h, i, p, box, start, at, m)


@triton.jit
def _held_rows(x, held, columns, N: tl.constexpr, TILE: tl.constexpr):
    """Pointer to the first of a held box's rows of a Pair, and how far the others are from it."""
    A: tl.constexpr = TILE.A
    p = first_row(x.video, held.b, held.h, held.box, A)
    o = steps_apart(x.video, held.at, columns, TILE.CLOSE)
    if TILE.TEXT:
        p_text = x.text.p + (held.b * x.text.b + held.h * x.text.h + held.start.to(tl.int64) * x.text.s) * A
        p = either_pointer(held.is_text, p_text, p, TILE.AMD)
        o = tl.where(held.is_text, tl.arange(0, N) * x.text.s, o)
    return p, o * A


@triton.jit
def load_held(x, held, m, columns, N: tl.constexpr, TILE: tl.constexpr):
    """Rows [N, W] of a Pair; 0 where m [N] is false."""
    ROW: tl.constexpr = TILE.ROW
    p, o = _held_rows(x, held, columns, N, TILE)
    return load_rows(p, o, m, ROW)


@triton.jit
def store_held(x, held, m, columns, b_x, N: tl.constexpr, TILE: tl.constexpr):
    """Stores what load_held loads."""
    ROW: tl.constexpr = TILE.ROW
    p, o = _held_rows(x, held, columns, N, TILE)
    store_rows(p, o, m, b_x, ROW)


@triton.jit
def box_result(box, at, S, L, columns, TILE: tl.constexpr):
    """A box's first token in its sample of the result, and how far [N] its others are."""
    first = box.frame * S + box.first
    if TILE.TEXT_FIRST:
        first += L
    o = tokens_apart(at, S, columns)
    if not TILE.CLOSE:
        o = o.to(tl.int64)
    return first.to(tl.int64), o


@triton.jit
def held_result(held, S, T, L, columns, N: tl.constexpr, TILE: tl.constexpr):
    """The same of a held box, or of a tile of text; and tokens of a sample."""
    first, o = box_result(held.box, held.at, S, L, columns, TILE)
    if TILE.TEXT:
        of_text = held.start if TILE.TEXT_FIRST else T * S + held.start
        first = tl.where(held.is_text, of_text, first)
        o = tl.where(held.is_text, tl.arange(0, N), o)
    return first, o, T * S + L


@triton.jit
def query_sight(held, lengths, S, L, T, T_k, q_start, TILE: tl.constexpr):
    """Of a held box of queries the rows [BM] that live, before which frame they see boxes of the video, and the runs
    that they see."""
    frames = Frames(T, T_k, q_start, -1, -1, 1, 0, 1)
    valid, last = valid_frames(lengths.frames, held.b, frames)
    alive = q_start + held.box.frame < last
    m = held.m & alive
    until = tl.where(alive, valid, 0)
    n_text, seen = 0, 0
    if TILE.TEXT:
        n_text = text_length(lengths, held.b, L)
        m = tl.where(held.is_text, held.start + tl.arange(0, TILE.BM) < n_text, m)
        if TILE.TEXT_SEES:
            seen = tl.where(held.is_text & (held.start < n_text), valid_key_frames(lengths, held.b, T_k) * S, 0)
        n_text = tl.where(tl.where(held.is_text, held.start < n_text, alive), n_text, 0)
    return m, until, Runs(0, 0, 0, seen, n_text)


@triton.jit
def key_sight(held, lengths, S, L, T, T_k, q_start, TILE: tl.constexpr):
    """Of a held box of keys the rows [BN] that live, before which query frame boxes of the video see it, and the runs
    that do."""
    frames = Frames(T, T_k, q_start, -1, -1, 1, 0, 1)
    valid, last = valid_frames(lengths.frames, held.b, frames)
    until = tl.where(held.box.frame < valid, last - q_start, 0)
    shown = held.box.frame < valid_key_frames(lengths, held.b, T_k)
    m = held.m & shown
    n_text, end = 0, 0
    if TILE.TEXT:
        of_text = text_length(lengths, held.b, L)
        is_read = held.start < of_text
        m = tl.where(held.is_text, held.start + tl.arange(0, TILE.BN) < of_text, m)
        end = tl.where(held.is_text & is_read, tl.maximum(last - q_start, 0) * S, 0)
        shown = shown if TILE.TEXT_SEES else shown & False
        n_text = tl.where(tl.where(held.is_text, is_read, shown), of_text, 0)
    return m, until, Runs(0, 0, 0, end, n_text)


@triton.jit
def run_tile(i, at, steps, N: tl.constexpr):
    """Where the i-th tile of a Walk is, of whole ones and then of what is left of each run, and its end."""
    whole = whole_tile(i, at, steps, N)
    left, left_stop = left_tile(i - steps.n_whole, at, steps, N)
    is_whole = i < steps.n_whole
    is_text = tl.where(is_whole, whole.is_text, left.is_text)
    start = tl.where(is_whole, whole.start, left.start)
    return At(is_text, at.b, at.h, start), tl.where(is_whole, whole.start + N, left_stop)


@triton.jit
def _tile_of(place, by):
    """place // tile: a half keeps the quotient away from whole numbers."""
    return ((place.to(tl.float32) + 0.5) * by).to(tl.int32)


@triton.jit
def _bounds(place, first, radius, by, tile, n, size, shift, OF_KEYS: tl.constexpr):
    """[begin, end) of what places of queries see along an axis, within a radius in tiles, or of what sees those of
    keys: counted from ``first``."""
    middle = _tile_of(place, by)
    # A radius of n tiles reaches everything, moved or not.
    if OF_KEYS:
        # Windows of the first tiles are moved to the first 2 r + 1, and so is it at the end.
        begin = tl.where(middle <= 2 * radius * shift - (1 - shift), -first, middle * tile - (radius * tile + first))
        last = middle * tile + ((radius + 1) * tile - first)
        end = tl.where(middle >= n - 2 * radius * shift - shift, size - first, last)
    else:
        middle = tl.minimum(tl.maximum(middle, radius * shift), n - 1 - radius * shift)
        begin = middle * tile - (radius * tile + first)
        end = middle * tile + ((radius + 1) * tile - first)
    return begin, tl.minimum(end, size - first)


@triton.jit
def box_places(at):
    """[N]: rows and columns of a box's places as halves of one number, for window_sees."""
    return at.row + (at.column << 16) + HALVES


@triton.jit
def window_sight(held, at, box, row_radius, column_radius, windows, OF_KEYS: tl.constexpr):
    """Where in a walked box of keys the windows of a held one's places [M] begin and end, rows and columns as halves;
    OF_KEYS: where in a box of queries those are that see the held keys."""
    w = windows
    row, column = box.first // w.columns, box.first % w.columns
    held_row, held_column = held.first // w.columns + at.row, held.first % w.columns + at.column
    y, y_end = _bounds(held_row, row, row_radius, w.by_rows, w.tile_rows, w.n_rows, w.rows, w.shift, OF_KEYS)
    x, x_end = _bounds(
        held_column, column, column_radius, w.by_columns, w.tile_columns, w.n_columns, w.columns, w.shift, OF_KEYS
    )
    return y + (x << 16), y_end + (x_end << 16)


@triton.jit
def window_sees(begin, end, place):
    """Which box_places are in a window_sight."""
    return ((place - begin) & (end - 1 - place) & HALVES) == HALVES


@triton.jit
def in_frame(box, place, windows):
    """[N]: which box_places of a walked box of windows are tokens."""
    row, column = box.first // windows.columns, box.first % windows.columns
    end = tl.minimum(windows.rows - row, 255) + (tl.minimum(windows.columns - column, 255) << 16)
    return ((end - 1 - place) & HALVES) == HALVES


@triton.jit
def before_frame(p_walked, begin, end, frame):
    """The first of the walked boxes [begin, end), ascending in frames, that is not before ``frame``."""
    while begin < end:
        middle = (begin + end) // 2
        is_before = tl.load(p_walked + middle.to(tl.int64) * WALKED) < frame
        begin = tl.where(is_before, middle + 1, begin)
        end = tl.where(is_before, end, middle)
    return begin


@triton.jit
def window_walk(held, p_walked, until, TILE: tl.constexpr):
    """Of a held box where its walked ones begin and how many need no test, and the same of those that are tested; with
    CUT of frames before ``until``. A tile of text has none."""
    begin, tested, end = tl.load(held.p + 3), tl.load(held.p + 4), tl.load(held.p + 5)
    whole_end = tested + 0
    if TILE.CUT:
        whole_end = before_frame(p_walked, begin, tested, until)
        end = before_frame(p_walked, tested, end, until)
    if TILE.TEXT:
        whole_end, end = tl.where(held.is_text, begin, whole_end), tl.where(held.is_text, tested, end)
    return begin.to(tl.int64), whole_end - begin, tested.to(tl.int64), end - tested


@triton.jit
def list_walk(lists, i_b, i_h, tile, TILE: tl.constexpr):
    """Pointer to the tiles that are listed for one, and how many boxes they are."""
    at = i_b * lists.b + i_h * lists.h
    if lists.counts is not None:
        p = lists.tiles + (at * lists.n + tile) * lists.K
        return p, tl.load(lists.counts + at * lists.n + tile) * TILE.WALKED_PARTS
    else:
        p_begin = lists.begin + at * (lists.n + 1) + tile
        begin = tl.load(p_begin)
        p = lists.tiles + at * lists.n * lists.K + begin
        return p, (tl.load(p_begin + 1) - begin) * TILE.WALKED_PARTS


@triton.jit
def listed_box(p_tiles, p_walked, i, TILE: tl.constexpr):
    """The i-th box of the listed tiles."""
    tile = tl.load(p_tiles + i // TILE.WALKED_PARTS).to(tl.int64)
    return read_box(p_walked + (tile * TILE.WALKED_PARTS + i % TILE.WALKED_PARTS) * WALKED)


@triton.jit
def window_box(p_walked, i):
    """The i-th walked box of a table, and the radii that hold between its frame and the held one's."""
    p = p_walked + i * WALKED
    return Box(tl.load(p), tl.load(p + 1), 0), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def _finite(x):
    zero = x.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, x, 0.0).to(x.dtype), zero


@triton.jit
def finite_rows(x):
    """Rows [N, W] with 0 for what is not finite.

    In a box that not all see, a hidden NaN or infinity must not come in as 0 * NaN.
    """
    if len(x) > 1:
        return _finite(x[0])[0], _finite(x[1])[0]
    else:
        return (_finite(x[0])[0],)


@triton.jit
def row_flags(x):
    """[N]: 0, or NaN where a row is not finite: added to what is seen of it, for what is seen must come out."""
    flag = tl.sum(_finite(x[0])[1], 1)
    if len(x) > 1:
        flag += tl.sum(_finite(x[1])[1], 1)
    return flag
