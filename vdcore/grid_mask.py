"""Which tokens a token may see: windows in frames, rows and columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdcore.extras import need
from vdcore.mask import FrameMask, Run, as_count, bounded, check_count

Radius = int | tuple[int, ...] | None
Border = Literal["clip", "shift"]
Steps = tuple[tuple[int, int], ...]  # (first frame distance, radius from there on), -1: no limit


@dataclass(frozen=True)
class GridMask:
    """Visibility between tokens of frames that are grids of rows and columns, in raster order.

    Coordinates are divided by ``tile``, rounded down, before distances are taken. Key ``(f', y', x')`` is visible to
    query ``(f, y, x)`` iff ``frames`` shows the key frame and, with ``d = |f' - f|``, its row and column are near:

    * ``border="clip"``: ``|y' - y| <= r`` with ``r = rows[d]``,
    * ``border="shift"``: with ``n`` rows of tiles, every row where ``2 r + 1 >= n``, else
      ``|y' - min(max(y, r), n - 1 - r)| <= r``: near a border the window keeps its size by moving inwards,

    and columns alike. Query frames are counted from ``q_start``, the index among the key frames of the first of them.

    Args:
        frames: which frames a frame sees, in frames, not tiles. With ``clean`` frames, for teacher forcing, distances
            are those within a half.
        rows: radius in rows of tiles; a tuple: by frame distance 0, 1, 2, ... in tiles, its last for all beyond; None:
            all rows.
        columns: likewise.
        tile: frames, rows and columns of a tile.
        border: of rows and columns.
        frame_border: ``"shift"``: the chunk of a query is moved inwards as rows are, in ``ceil(T_k / chunk)`` chunks of
            key frames; only with ``frames.past == frames.future``, both finite, and nothing else but a chunk.
        sink: key frames below it are visible in all rows and columns, wherever ``frames`` shows them.

    ``frames`` alone, without limits of rows and columns, is the :class:`FrameMask` and costs what that does.
    """

    frames: FrameMask = FrameMask()
    rows: Radius = None
    columns: Radius = None
    tile: tuple[int, int, int] = (1, 1, 1)
    border: Border = "clip"
    frame_border: Border = "clip"
    sink: int = 0
    # Radii as steps: what crosses an operator's boundary, and what torch.compile guards on.
    row_steps: Steps = field(init=False, repr=False, compare=False, default=())
    column_steps: Steps = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if not isinstance(self.frames, FrameMask):
            raise TypeError(f"GridMask: frames must be a FrameMask, got {type(self.frames).__name__}")
        for name in ("rows", "columns"):
            object.__setattr__(self, f"{name.removesuffix('s')}_steps", _steps(name, getattr(self, name)))
        sizes = _check_sizes("GridMask", "tile", self.tile)
        object.__setattr__(self, "tile", tuple(map(bounded, sizes)))
        for name in ("border", "frame_border"):
            if getattr(self, name) not in ("clip", "shift"):
                raise ValueError(f"GridMask: {name} must be 'clip' or 'shift', got {getattr(self, name)!r}")
        check_count("GridMask", "sink", self.sink)
        object.__setattr__(self, "sink", bounded(self.sink))
        past, future, chunk = self.frames.past, self.frames.future, self.frames.chunk
        symmetric = past is not None and past == future and self.frames == FrameMask(past, future, chunk)
        if self.frame_border == "shift" and not symmetric:
            raise ValueError(
                "GridMask: frame_border='shift' must come with frames whose past and future are equal and finite, and "
                f"without a sink, got {self.frames}"
            )

    @staticmethod
    def window(past: int | None, future: int | None, rows: Radius, columns: Radius) -> GridMask:
        """``past`` frames before and ``future`` after a token's own, within radii of rows and columns; clipped."""
        return GridMask(FrameMask(past, future), rows, columns)

    @staticmethod
    def neighborhood(kernel_size: Sequence[int], causal: bool | Sequence[bool] = False) -> GridMask:
        """Neighborhood attention as NATTEN defines it (Hassani et al. 2023): windows of one size that move inwards.

        Args:
            kernel_size: frames, rows and columns of a window; odd.
            causal: in time: a frame sees itself and ``kernel_size[0] - 1`` frames before it, clipped at the first. Also
                NATTEN's triple, whose last two must be False.
        """
        sizes = _odd("GridMask.neighborhood", "kernel_size", kernel_size)
        flags = (causal, False, False) if isinstance(causal, bool) else _as_tuple(causal)
        if not isinstance(flags, tuple) or len(flags) != 3 or any(flags[1:]):
            raise ValueError(
                "GridMask.neighborhood: causal must be a bool, or three of which rows' and columns' are False, got "
                f"{causal!r}"
            )
        frames = FrameMask.window(sizes[0] - 1) if flags[0] else FrameMask.symmetric(sizes[0] // 2)
        frame_border: Border = "clip" if flags[0] else "shift"
        return GridMask(frames, sizes[1] // 2, sizes[2] // 2, border="shift", frame_border=frame_border)

    @staticmethod
    def tiles(window: Sequence[int], tile: Sequence[int]) -> GridMask:
        """Sliding tile attention (Zhang et al. 2025): tokens of a tile see the tiles of a window around it.

        Args:
            window: frames, rows and columns of a window, in tiles; odd.
            tile: frames, rows and columns of a tile; it need not divide the video.
        """
        sizes = _odd("GridMask.tiles", "window", window)
        box = _check_sizes("GridMask.tiles", "tile", _as_tuple(tile))
        frames = FrameMask(sizes[0] // 2, sizes[0] // 2, chunk=box[0])
        return GridMask(frames, sizes[1] // 2, sizes[2] // 2, box, "shift", "shift")

    @staticmethod
    def radial(rows: int, columns: int, sink: int = 1, frames: int = 4096) -> GridMask:
        """Radial attention (Li et al. 2025): the window's area halves as the frame distance doubles.

        At distance ``d <= 1`` everything; else with ``k = ceil(log2 d)`` the radii are ``ceil(rows / 2**ceil(k / 2))``
        and ``ceil(columns / 2**(k // 2))``. Visible pairs grow with frames as ``N log N``.

        Args:
            rows, columns: the grid's sizes.
            sink: first frames that are seen in full from everywhere.
            frames: distances that radii are listed for; beyond, the last holds.
        """
        _check_sizes("GridMask.radial", "rows, columns and frames", (rows, columns, frames))
        halvings = [max(d - 1, 0).bit_length() for d in range(frames)]  # ceil(log2 d)
        return GridMask(
            FrameMask(),
            rows=tuple(_ceil(rows, -(-k // 2)) for k in halvings),
            columns=tuple(_ceil(columns, k // 2) for k in halvings),
            sink=sink,
        )

    # ---- What is visible ----

    def visible(self, T: int, rows: int, columns: int, T_k: int | None = None, q_start: int = 0) -> Tensor:
        """The definition, as a boolean tensor ``(T * rows * columns, T_k * rows * columns)``: for small sizes.

        ``T_k=None`` means ``q_start + T``.
        """
        T, rows, columns, T_k, q_start = _sizes(T, rows, columns, T_k, q_start)
        shown, distance = self._frames_shown(T, T_k, q_start), self._distance(T, T_k, q_start)
        by_row = _near(self.row_steps, distance, rows, self.tile[1], self.border)
        by_column = _near(self.column_steps, distance, columns, self.tile[2], self.border)
        near = by_row[:, :, :, None, :, None] & by_column[:, :, None, :, None, :]  # (T, T_k, y, x, y', x')
        whole = torch.arange(T_k) < self.sink
        seen = shown[:, :, None, None, None, None] & (near | whole[None, :, None, None, None, None])
        return seen.permute(0, 2, 3, 1, 4, 5).reshape(T * rows * columns, T_k * rows * columns)

    def frame_runs(self, T_q: int, T_k: int | None = None, q_start: int = 0) -> tuple[tuple[Run, ...], ...]:
        """Per query frame the key frames of which it sees anything, as :meth:`FrameMask.runs`."""
        T_q, _, _, T_k, q_start = _sizes(T_q, 0, 0, T_k, q_start)
        if self.frame_border == "clip":
            return self.frames.runs(T_q, T_k, q_start)
        return _shifted_runs(self.frames, T_q, T_k, q_start)

    def pairs(self, T: int, rows: int, columns: int, T_k: int | None = None, q_start: int = 0) -> Tensor:
        """Visible pairs of tokens by frames, int64 ``(T, T_k)``, counted without a tensor of all pairs."""
        T, rows, columns, T_k, q_start = _sizes(T, rows, columns, T_k, q_start)
        shown = torch.zeros(T, T_k, dtype=torch.bool)
        for t, runs in enumerate(self.frame_runs(T, T_k, q_start)):
            for begin, end in runs:
                shown[t, begin:end] = True
        distance = self._distance(T, T_k, q_start)
        area = torch.ones(T, T_k, dtype=torch.int64)
        for steps, size, tile in ((self.row_steps, rows, self.tile[1]), (self.column_steps, columns, self.tile[2])):
            counts = torch.tensor([_near_pairs(radius, size, tile, self.border) for _, radius in steps])
            area *= counts[_step_of(steps, distance)]
        area[:, : self.sink] = (rows * columns) ** 2
        return torch.where(shown, area, 0)

    def density(self, T: int, rows: int, columns: int, T_k: int | None = None, q_start: int = 0) -> float:
        """Visible pairs over all pairs; 0 where there are none."""
        T, rows, columns, T_k, q_start = _sizes(T, rows, columns, T_k, q_start)
        every = T * T_k * (rows * columns) ** 2
        return int(self.pairs(T, rows, columns, T_k, q_start).sum()) / every if every else 0.0

    def show(self, path: str | Path, T: int, rows: int, columns: int, T_k: int | None = None, q_start: int = 0) -> None:
        """Draws what is visible between frames, and what three tokens see in every key frame.

        Args:
            path: of the picture, in any format of matplotlib's.

        Raises:
            ImportError: without matplotlib.
        """
        figure = need("matplotlib.figure", "bench", "GridMask.show").Figure(figsize=(12, 6), layout="constrained")
        _draw(figure, self, *_sizes(T, rows, columns, T_k, q_start))
        figure.savefig(path)

    # ---- Frames ----

    @property
    def frames_alone(self) -> bool:
        """There are no limits of rows and columns, and no shift: it is the FrameMask."""
        unlimited = ((0, -1),)
        return self.frame_border == "clip" and self.row_steps == unlimited and self.column_steps == unlimited

    def _frames_shown(self, T: int, T_k: int, q_start: int) -> Tensor:
        """``(T, T_k)``"""
        if self.frame_border == "clip":
            return self.frames.visible(T, T_k, q_start)
        radius, chunk = self.frames.past, bounded(self.frames.chunk)
        assert radius is not None
        mine, other = torch.arange(q_start, q_start + T) // chunk, torch.arange(T_k) // chunk
        return _within(mine, other, bounded(radius), -(-T_k // chunk), "shift")

    def _distance(self, T: int, T_k: int, q_start: int) -> Tensor:
        """``(T, T_k)``: between frames, in tiles. Under teacher forcing a noisy frame lies where its clean one does."""
        mine, other = torch.arange(q_start, q_start + T), torch.arange(T_k)
        if self.frames.clean:
            clean = bounded(self.frames.clean)
            mine, other = mine % clean, other % clean
        return (mine[:, None] // self.tile[0] - other[None, :] // self.tile[0]).abs()


@dataclass(frozen=True)
class HeadMasks:
    """Masks of groups of heads over one grid.

    Args:
        grid: rows and columns of a frame.
        groups: ``(query heads, mask)``, in the order of the heads.
    """

    grid: tuple[int, int]
    groups: tuple[tuple[int, GridMask], ...]

    def heads(self) -> list[tuple[int, int, GridMask]]:
        """``(first head, end, mask)`` of every group."""
        found, first = [], 0
        for count, mask in self.groups:
            found.append((first, first + count, mask))
            first += count
        return found


# ---- One axis ----


def _within(mine: Tensor, other: Tensor, radius: int, n: int, border: Border) -> Tensor:
    """``(len(mine), len(other))``: coordinates in tiles, of which there are n, within a radius."""
    if border == "shift":
        if 2 * radius + 1 >= n:
            return torch.ones(len(mine), len(other), dtype=torch.bool)
        mine = mine.clamp(radius, n - 1 - radius)
    return (other[None, :] - mine[:, None]).abs() <= radius


def _axis(radius: int, size: int, tile: int, border: Border) -> Tensor:
    """``(size, size)``: which of an axis' tokens see which; radius -1: all."""
    place = torch.arange(size) // tile
    if radius < 0:
        return torch.ones(size, size, dtype=torch.bool)
    return _within(place, place, radius, -(-size // tile), border)


def _near(steps: Steps, distance: Tensor, size: int, tile: int, border: Border) -> Tensor:
    """``(*distance.shape, size, size)``"""
    each = torch.stack([_axis(radius, size, tile, border) for _, radius in steps])
    return each[_step_of(steps, distance)]


def _step_of(steps: Steps, distance: Tensor) -> Tensor:
    """Which of the steps holds at a distance."""
    return torch.bucketize(distance, torch.tensor([first for first, _ in steps]), right=True) - 1


@lru_cache(maxsize=1024)
def _near_pairs(radius: int, size: int, tile: int, border: Border) -> int:
    return int(_axis(radius, size, tile, border).sum())


@lru_cache(maxsize=256)
def _shifted_runs(frames: FrameMask, T_q: int, T_k: int, q_start: int) -> tuple[tuple[Run, ...], ...]:
    """Runs of query frames whose chunk has been moved inwards."""
    radius, chunk, n = frames.past, frames.chunk, -(-T_k // frames.chunk)
    assert radius is not None
    if 2 * radius + 1 >= n:
        return (((0, T_k),) if T_k else (),) * T_q
    chunks = (min(max(q // chunk, radius), n - 1 - radius) for q in range(q_start, q_start + T_q))
    return tuple(frames.runs(1, T_k, c * chunk)[0] for c in chunks)


# ---- Checks ----


def _sizes(T: int, rows: int, columns: int, T_k: int | None, q_start: int) -> tuple[int, int, int, int, int]:
    """As ints, with T_k's default."""
    T, q_start = as_count("GridMask", "T", T), as_count("GridMask", "q_start", q_start)
    T_k = q_start + T if T_k is None else as_count("GridMask", "T_k", T_k)
    return T, as_count("GridMask", "rows", rows), as_count("GridMask", "columns", columns), T_k, q_start


def _check_sizes(owner: str, name: str, sizes: Any) -> tuple[int, int, int]:
    if not isinstance(sizes, tuple) or len(sizes) != 3:
        raise TypeError(f"{owner}: {name} must be a tuple of three ints, got {sizes!r}")
    for size in sizes:
        check_count(owner, name, size, 1)
    return sizes


def _as_tuple(sizes: Any) -> Any:
    """What has no members is left to be refused by name."""
    return tuple(sizes) if isinstance(sizes, Iterable) else sizes


def _odd(owner: str, name: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    found = _check_sizes(owner, name, _as_tuple(sizes))
    if not all(size % 2 for size in found):
        raise ValueError(f"{owner}: {name} must be odd in frames, rows and columns, got {found}")
    return found


def _steps(name: str, radius: Any) -> Steps:
    if radius is None:
        return ((0, -1),)
    radii = radius if isinstance(radius, tuple) else (radius,)
    if not radii:
        raise ValueError(f"GridMask: {name} must be a radius, a tuple of at least one, or None, got ()")
    for r in radii:
        check_count("GridMask", name, r)
    return tuple((d, bounded(r)) for d, r in enumerate(radii) if d == 0 or r != radii[d - 1])


def _ceil(size: int, halvings: int) -> int:
    return -(-size >> halvings)


# ---- A picture ----


def _draw(figure: Any, mask: GridMask, T: int, rows: int, columns: int, T_k: int, q_start: int) -> None:
    """Left: the visible share of pairs, by frames. Right: what tokens of the middle frame see, a row each."""
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    shares = mask.pairs(T, rows, columns, T_k, q_start) / max((rows * columns) ** 2, 1)
    axes = left.subplots()
    axes.imshow(shares.numpy(), vmin=0, vmax=1, interpolation="nearest")
    density = mask.density(T, rows, columns, T_k, q_start)
    axes.set(xlabel="key frame", ylabel="query frame", title=f"visible share of pairs, {density:.1%} of all")

    frame = q_start + T // 2
    seen = mask.visible(1, rows, columns, T_k, frame).reshape(rows, columns, T_k, rows, columns)
    keys = sorted({round(i * (T_k - 1) / 6) for i in range(7)} | {min(frame, T_k - 1)})
    tokens = ((0, 0), (rows // 2, columns // 2), (rows - 1, columns // 4))
    for i, ((y, x), line) in enumerate(zip(tokens, right.subplots(len(tokens), len(keys), squeeze=False))):
        for k, axes in zip(keys, line):
            axes.imshow(seen[y, x, k].numpy(), vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=(), yticks=(), title=f"frame {k}" if i == 0 else "")
            if k == frame:
                axes.plot(x, y, "r.")
    right.suptitle(f"what a token of frame {frame} sees, at three places")
