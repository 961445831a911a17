"""Tiles: boxes of frames, rows and columns of tokens, in raster order, cut off at the borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore.ops import check


def check_tiles(op: str, tile: Any, grid: Any, S: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A tile's sizes, and those of a frame."""
    box = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    if len(box) != 3 or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in box):
        raise TypeError(f"{op}: tile must be a tuple of three ints (frames, rows, columns), got {tile!r}")
    if min(box) < 1:
        check.wrong(op, "tile", "at least 1 in frames, rows and columns", box)
    sizes = check.check_grid(op, grid, S, needed="of a frame's tokens")
    assert sizes is not None
    return (int(box[0]), int(box[1]), int(box[2])), sizes


def tiles_of(T: int, grid: tuple[int, int], tile: tuple[int, int, int]) -> int:
    """How many tiles cover the video."""
    count = 1
    for size, step in zip((T, *grid), tile):
        count *= -(-size // step)
    return count


def tokens_of(T: int, grid: tuple[int, int], tile: tuple[int, int, int]) -> list[Tensor]:
    """Of every tile, in raster order, its tokens, counted through all frames, ascending."""
    place = torch.arange(T * grid[0] * grid[1]).view(T, *grid)
    if not place.numel():
        return []
    return [
        x.flatten()
        for frames in place.split(tile[0])
        for rows in frames.split(tile[1], 1)
        for x in rows.split(tile[2], 2)
    ]
