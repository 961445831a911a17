"""Which boxes of tokens see which: tables that kernels walk through, made once for a mask and a grid, or for tiles.

A box is a few frames, rows and columns of tokens, at most as many as a kernel's tile has rows. A program holds one box
and walks through boxes of the other side. Under a mask boxes lie in one frame, their shapes are chosen for it, and the
walked ones begin where what the held one sees begins: those that all of it sees come first, and need no test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdcore.grid_mask import GridMask

Array = Any  # of numpy
Box = tuple[int, int, int]  # frames, rows, columns
# How much longer a box takes whose pairs are tested, by a count of instructions and not by a measurement.
_TESTED = 1.8
HELD, WALKED = 8, 4  # numbers of a held and of a walked box


@dataclass(frozen=True)
class Boxes:
    """Tables of boxes, int32.

    Args:
        held: ``(n, 8)``: frame, first token in it, frames, rows and columns as bytes of one number; under a mask also
            where its walked boxes begin, where those begin that are tested, and their end.
        walked: ``(m, 4)``: frame, first token in it; under a mask the radii of rows and columns between the frames;
            of tiles the third number of a held one.
        held_box, walked_box: their sizes where nothing cuts them off.
        parts: of tiles: boxes of a tile, of either side.
        even: of tiles: every place of a walked box is a token.
    """

    held: Tensor
    walked: Tensor
    held_box: Box
    walked_box: Box
    parts: tuple[int, int] = (1, 1)
    even: bool = False


# ---- Windows ----


def reach(radius: int, size: int, tile: int, shifted: bool) -> int:
    """A radius as kernels take it: one of all tiles stands for no limit."""
    n = -(-size // tile)
    everything = radius < 0 or radius >= n or (shifted and 2 * radius + 1 >= n)
    return n if everything else radius


@lru_cache(maxsize=1024)
def _interval(radius: int, size: int, tile: int, shifted: bool, of_keys: bool) -> tuple[Array, Array]:
    """Of every place of an axis [begin, end) of the other side's that it sees, or that see it; both never fall."""
    n, r = -(-size // tile), reach(radius, size, tile, shifted)
    place = np.arange(size) // tile
    if shifted and r < n:
        place = place.clip(r, n - 1 - r)
    begin, end = ((place - r) * tile).clip(0), ((place + r + 1) * tile).clip(max=size)
    if of_keys:
        y = np.arange(size)
        return np.searchsorted(end, y, "right"), np.searchsorted(begin, y, "right")
    return begin, end


class _Axis:
    """Rows or columns: the other side's pieces for every band of the held side, by radius.

    count, offset (radii, bands): of pieces; start, whole: of all pieces, where they begin, and whether all of the band
    sees all of them.
    """

    def __init__(self, radii: list[int], size: int, tile: int, shifted: bool, of_keys: bool, held: int, walked: int):
        first = np.arange(0, size, held)
        last = np.minimum(first + held, size) - 1
        sees = [_interval(r, size, tile, shifted, of_keys) for r in radii]
        begin, end = (np.stack([x[i] for x in sees]) for i in range(2))
        low, high = begin[:, first], end[:, last]
        self.count = -(-(high - low).clip(0) // walked)
        self.offset = (self.count.cumsum() - self.count.ravel()).reshape(self.count.shape)
        band = np.repeat(np.arange(self.count.size), self.count.ravel())
        self.start = low.ravel()[band] + walked * (np.arange(len(band)) - self.offset.ravel()[band])
        inner, outer = begin[:, last].ravel()[band], end[:, first].ravel()[band]
        self.whole = (self.start >= inner) & (self.start + walked <= outer)
        sums = np.zeros((2, self.count.size), np.int64)
        np.add.at(sums[0], band, 1)
        np.add.at(sums[1], band, self.whole)
        # Pieces of all bands, and of these the whole ones, by radius.
        self.pieces, self.wholes = sums.reshape(2, *self.count.shape).sum(-1)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of frames that see each other, in the order of the held one: both frames, and which radii hold."""

    held: Array
    walked: Array
    row: Array
    column: Array


def _pairs(mask: GridMask, T: int, T_k: int, q_start: int, of_keys: bool) -> _Pairs:
    shown = np.zeros((T, T_k), bool)
    for frame, runs in enumerate(mask.frame_runs(T, T_k, q_start)):
        for begin, end in runs:
            shown[frame, begin:end] = True
    t, g = np.nonzero(shown)
    if of_keys:
        order = np.lexsort((t, g))
        t, g = t[order], g[order]
    mine, other = (x % mask.frames.clean if mask.frames.clean else x for x in (t + q_start, g))
    distance: Array = abs(mine // mask.tile[0] - other // mask.tile[0])

    def steps(of: Any) -> Array:
        """The last stands for everything, which sinks are seen with."""
        return np.where(g < mask.sink, len(of), np.searchsorted([d for d, _ in of], distance, "right") - 1)

    held, walked = (g, t) if of_keys else (t, g)
    return _Pairs(held, walked, steps(mask.row_steps), steps(mask.column_steps))


def _shapes(n: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows and columns of boxes of n tokens, a power of two: those that do not exceed a grid twofold, if there are."""
    every = [(2**i, n >> i) for i in range(n.bit_length())]
    return [(h, w) for h, w in every if h < 2 * rows and w < 2 * columns] or every


@lru_cache(maxsize=64)
def windows(
    mask: GridMask,
    grid: tuple[int, int],
    T: int,
    T_k: int,
    q_start: int,
    *,
    of_keys: bool,
    held: int,
    walked: int,
    device: torch.device,
) -> Boxes:
    """Boxes of ``held`` tokens of the queries, or of the keys, and what they walk through, ``walked`` at a time."""
    pairs = _pairs(mask, T, T_k, q_start, of_keys)
    radii = [[r for _, r in steps] + [-1] for steps in (mask.row_steps, mask.column_steps)]
    shifted = mask.border == "shift"

    @cache
    def axis(i: int, of_held: int, of_walked: int) -> _Axis:
        return _Axis(radii[i], grid[i], mask.tile[1 + i], shifted, of_keys, of_held, of_walked)

    kinds, many = np.unique(np.stack((pairs.row, pairs.column)), axis=1, return_counts=True)

    def cost(shapes: Any) -> float:
        (h, w), (of_h, of_w) = shapes
        rows, columns = axis(0, h, of_h), axis(1, w, of_w)
        every = (rows.pieces[kinds[0]] * columns.pieces[kinds[1]] * many).sum()
        whole = (rows.wholes[kinds[0]] * columns.wholes[kinds[1]] * many).sum()
        return float(_TESTED * every - (_TESTED - 1) * whole)

    choices = [(a, b) for a in _shapes(held, *grid) for b in _shapes(walked, *grid)]
    (h, w), (of_h, of_w) = min(choices, key=cost)
    rows, columns = axis(0, h, of_h), axis(1, w, of_w)
    frames = T_k if of_keys else T
    limits = [[reach(r, n, tile, shifted) for r in of] for of, n, tile in zip(radii, grid, mask.tile[1:])]
    found = _tables(pairs, frames, grid, (h, w), rows, columns, limits)
    of_held, of_walked = (torch.from_numpy(x).to(device) for x in found)
    return Boxes(of_held, of_walked, (1, h, w), (1, of_h, of_w))


def _tables(
    pairs: _Pairs, frames: int, grid: tuple[int, int], box: tuple[int, int], rows: _Axis, columns: _Axis, limits: Any
) -> tuple[Array, Array]:
    """``(n, 8)`` and ``(m, 4)``"""
    down, across = rows.count.shape[1], columns.count.shape[1]
    counts = rows.count[pairs.row][:, :, None] * columns.count[pairs.column][:, None, :]
    of = np.repeat(np.arange(counts.size), counts.ravel())
    place = np.arange(len(of)) - np.repeat(counts.cumsum() - counts.ravel(), counts.ravel())
    pair, y, x = np.unravel_index(of, counts.shape)
    wide = columns.count[pairs.column[pair], x]
    i = rows.offset[pairs.row[pair], y] + place // wide if len(of) else of
    j = columns.offset[pairs.column[pair], x] + place % wide if len(of) else of
    tested = ~(rows.whole[i] & columns.whole[j])
    key = ((pairs.held[pair] * down + y) * across + x) * 2 + tested
    order = np.argsort(key, kind="stable")  # within either half by frames, as pairs are
    radius = [np.array(of_axis)[step[pair]] for of_axis, step in zip(limits, (pairs.row, pairs.column))]
    walked = np.stack((pairs.walked[pair], rows.start[i] * grid[1] + columns.start[j], *radius), 1)[order]
    n = frames * down * across
    bounds = np.concatenate(([0], np.bincount(key, minlength=2 * n).cumsum()))
    frame, y, x = np.unravel_index(np.arange(n), (frames, down, across))
    y, x = y * box[0], x * box[1]
    extent = _packed(np.ones_like(y), np.minimum(box[0], grid[0] - y), np.minimum(box[1], grid[1] - x))
    nothing = np.zeros_like(y)
    numbers = (frame, y * grid[1] + x, extent, bounds[:-1:2], bounds[1::2], bounds[2::2], nothing, nothing)
    return np.stack(numbers, 1).astype(np.int32), walked.astype(np.int32)


def _packed(frames: Array, rows: Array, columns: Array) -> Array:
    return frames | rows << 8 | columns << 16


# ---- Tiles ----


def _box_of(tile: Box, n: int) -> Box:
    """The box of at most n tokens of which the fewest make a tile, and of these the largest."""
    choices = [
        (f, y, x)
        for f in range(1, min(tile[0], n) + 1)
        for y in range(1, min(tile[1], n // f) + 1)
        for x in range(1, min(tile[2], n // f // y) + 1)
    ]
    return min(choices, key=lambda box: (_boxes_of(tile, box), -box[0] * box[1] * box[2], box[0]))


def _boxes_of(tile: Box, box: Box) -> int:
    count = 1
    for size, step in zip(tile, box):
        count *= -(-size // step)
    return count


def _tile_table(T: int, grid: tuple[int, int], tile: Box, n: int) -> tuple[Box, int, Array]:
    """A box, how many make a tile, and of all tiles' boxes, in order: frame, first token in it, extent."""
    sizes = (T, *grid)
    box = _box_of((min(tile[0], T), min(tile[1], grid[0]), min(tile[2], grid[1])), n)
    starts, extents = [], []
    for size, step, part in zip(sizes, tile, box):
        first = np.arange(0, size, step)[:, None] + np.arange(0, min(step, size), part)
        end = np.minimum(np.arange(0, size, step)[:, None] + step, size)
        extents.append((end - first).clip(0, part))
        starts.append(np.minimum(first, size - 1))
    # (tiles, boxes of a tile) of every axis -> tiles of all axes, then boxes of all.
    places: list[Any] = [
        (slice(None), None, None, slice(None), None, None),
        (None, slice(None), None, None, slice(None), None),
    ]
    places.append((None, None, slice(None), None, None, slice(None)))
    f, y, x = (start[place] for start, place in zip(starts, places))
    extent = _packed(*(part[place] for part, place in zip(extents, places)))
    frame, first, extent = np.broadcast_arrays(f, y * grid[1] + x, extent)
    parts = starts[0].shape[1] * starts[1].shape[1] * starts[2].shape[1]
    return box, parts, np.stack([frame.ravel(), first.ravel(), extent.ravel()], 1)


@lru_cache(maxsize=64)
def tiles(T: int, grid: tuple[int, int], tile: Box, *, held: int, walked: int, device: torch.device) -> Boxes:
    """Boxes of ``held`` and of ``walked`` tokens that tiles are made of."""
    held_box, held_parts, of_held = _tile_table(T, grid, tile, held)
    walked_box, walked_parts, of_walked = _tile_table(T, grid, tile, walked)
    extent = of_walked[:, 2]
    even = bool(((extent & 255) * (extent >> 8 & 255) * (extent >> 16) == walked).all())

    def table(x: Array, width: int) -> Tensor:
        whole = np.zeros((len(x), width), np.int32)
        whole[:, :3] = x
        return torch.from_numpy(whole).to(device)

    parts = held_parts, walked_parts
    return Boxes(table(of_held, HELD), table(of_walked, WALKED), held_box, walked_box, parts, even)


def transposed(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of lists ``(lists, n, K)`` and counts ``(lists, n)``: who lists each tile, ascending ``(lists, n * K)``, and
    where each one's begin ``(lists, n + 1)``, int32. Nothing waits for the device.
    """
    lists, n, K = indices.shape
    there = torch.arange(K, device=indices.device) < counts[..., None]
    listed, order = torch.where(there, indices, n).flatten(1).sort(dim=1, stable=True)
    every = torch.arange(n + 1, dtype=torch.int32, device=indices.device).expand(lists, -1).contiguous()
    begin = torch.searchsorted(listed.contiguous(), every, out_int32=True)
    return (order // max(K, 1)).to(torch.int32), begin
