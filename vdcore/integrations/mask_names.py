"""Names of masks, as command lines and tables have them: ``neighborhood:3/15/27``, ``radial``, ``frames:2``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vdcore.grid_mask import GridMask
from vdcore.mask import FrameMask

Grid = tuple[int, int, int]  # frames, rows and columns of tokens
One: TypeAlias = FrameMask | GridMask

FORMS = {
    "dense": "everything",
    "same-frame": "a frame sees itself",
    "causal": "a frame sees itself and those before it",
    "frames:PAST/FUTURE": "frames before and after; one number: to either side",
    "window:PAST/FUTURE/ROWS/COLUMNS": "radii, cut at borders; `all` for no limit",
    "neighborhood:FRAMES/ROWS/COLUMNS": "window sizes, odd, moved inwards at borders (NATTEN)",
    "tiles:FRAMES/ROWS/COLUMNS:FRAMES/ROWS/COLUMNS": "window in tiles, odd, and the tile (sliding tile attention)",
    "radial:SINK": "everything one frame away, and half the area where the distance doubles; SINK frames in full, or 1",
}


def parse_mask(name: str, grid: Grid) -> One:
    """The mask of a name on a grid.

    Raises:
        ValueError: if it is none of :data:`FORMS`.
    """
    kind, *groups = name.split(":")
    try:
        return _MAKERS[kind](grid, *([_number(x) for x in group.split("/")] for group in groups))
    except (KeyError, TypeError) as error:
        forms = ", ".join(FORMS)
        raise ValueError(f"mask: expected one of {forms}, got {name!r}") from error


def _number(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise TypeError(text)
    return int(text)


def _frames(grid: Grid, radii: list[int | None]) -> FrameMask:
    if len(radii) == 1:
        return FrameMask(radii[0], radii[0])
    past, future = radii if len(radii) == 2 else _wrong(radii)
    return FrameMask(past, future)


def _window(grid: Grid, radii: list[int | None]) -> GridMask:
    past, future, rows, columns = radii if len(radii) == 4 else _wrong(radii)
    return GridMask.window(past, future, rows, columns)


def _neighborhood(grid: Grid, sizes: list[int | None]) -> GridMask:
    return GridMask.neighborhood(_three(sizes))


def _tiles(grid: Grid, window: list[int | None], tile: list[int | None]) -> GridMask:
    return GridMask.tiles(_three(window), _three(tile))


def _radial(grid: Grid, sink: list[int | None] | None = None) -> GridMask:
    (count,) = [1] if sink is None else sink if len(sink) == 1 else _wrong(sink)
    if count is None:
        raise TypeError("all")
    return GridMask.radial(grid[1], grid[2], sink=count)


def _three(sizes: list[int | None]) -> tuple[int, ...]:
    known = tuple(n for n in sizes if n is not None)
    return known if len(sizes) == len(known) == 3 else _wrong(sizes)


def _wrong(numbers: list[int | None]) -> tuple[int, ...]:
    raise TypeError(numbers)


_MAKERS: dict[str, Callable[..., One]] = {
    "dense": lambda grid: FrameMask.full(),
    "same-frame": lambda grid: FrameMask.same_frame(),
    "causal": lambda grid: FrameMask.causal(),
    "frames": _frames,
    "window": _window,
    "neighborhood": _neighborhood,
    "tiles": _tiles,
    "radial": _radial,
}


def candidates(grid: Grid) -> tuple[str, ...]:
    """Masks worth trying on a grid, of every kind, from a few hundredths of its pairs to half of them."""
    T, rows, columns = grid
    half, quarter = (tuple(_odd(n // part) for n in grid) for part in (2, 4))
    tile = (1, min(4, rows), min(8, columns))
    names = [
        "same-frame",
        "frames:1",
        "frames:2",
        "window:all/all/1/1",
        f"neighborhood:{_text(quarter)}",
        f"neighborhood:{_text(half)}",
        f"neighborhood:{_text((_odd(T), *quarter[1:]))}",
        f"neighborhood:{_text((_odd(T), *half[1:]))}",
        f"tiles:3/3/3:{_text(tile)}",
        "radial",
    ]
    return tuple(dict.fromkeys(names))


def _odd(n: int) -> int:
    """The largest odd number up to n."""
    return max(n - 1 + n % 2, 1)


def _text(sizes: tuple[int, ...]) -> str:
    return "/".join(map(str, sizes))
