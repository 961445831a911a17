"""Where a token is: sinusoidal embeddings and rotary tables, for any frame positions.

Both are made per axis and laid out over the grid, so that they cost as many sines as the grid has rows, columns and
frames, not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcore.rope import Rope


def sincos(position: Tensor, width: int) -> Tensor:
    """``[sin(p w_j), cos(p w_j)]`` with ``w_j = 10000 ** (-2 j / width)`` (Vaswani et al. 2017).

    ``(N,)`` to ``(N, width)``, in float64.
    """
    angle = _angles(position, width, 1e4)
    return torch.cat((angle.sin(), angle.cos()), -1)


def sincos_grid(grid: tuple[int, int], width: int, base_size: float | None, device: torch.device) -> Tensor:
    """Embeddings of the tokens of a frame: half of the channels for the column, half for the row.

    Args:
        grid: rows and columns (H, W).
        base_size: row ``i`` of ``n`` has the position ``i * base_size / n``; None: ``i``.

    Returns:
        float32 ``(H*W, width)``.
    """
    rows, columns = (
        sincos(torch.arange(n, dtype=torch.float64, device=device) * (1.0 if base_size is None else base_size / n), d)
        for n, d in zip(grid, (width // 2, width // 2))
    )
    return _over_grid(columns[None, :], rows[:, None], grid).float()


def _over_grid(a: Tensor, b: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(1 or H, 1 or W, *)`` twice, side by side for every token: ``(H*W, *)``."""
    return torch.cat((a.expand(*grid, -1), b.expand(*grid, -1)), -1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Rotations:
    """The rotary tables of a forward pass; None where an attention does not rotate.

    Args:
        space: ``(1, S, R/2)``, rows and columns.
        time: ``(T, 1, R/2)``, frames.
        full: ``(T, S, R/2)``, all three.
    """

    space: Rope | None = None
    time: Rope | None = None
    full: Rope | None = None


def _angles(position: Tensor, channels: int, theta: float) -> Tensor:
    """``p theta ** (-2 j / channels)``, in float64: ``(N,) -> (N, channels / 2)``."""
    frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=position.device) / channels)
    return position.double()[:, None] * frequency


def _table(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos().float(), angle.sin().float()


def time_rope(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """All channels rotate with the frame. ``positions`` ``(T,)``; table ``(T, 1, head_dim / 2)``."""
    return Rope(*_table(_angles(positions, head_dim, theta)[:, None]))


def space_channels(head_dim: int) -> tuple[int, int]:
    """How many channels rotate with the row, and with the column."""
    columns = head_dim // 4 * 2
    return head_dim - columns, columns


def full_channels(head_dim: int) -> tuple[int, int, int]:
    """How many channels rotate with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def space_rope(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device) -> Rope:
    """Half of the channels (rounded to pairs) rotate with the row, half with the column: ``(1, H*W, R/2)``."""
    cos, sin = (
        _over_grid(row[:, None], column[None, :], grid)[None]
        for row, column in _axis_tables(grid, space_channels(head_dim), theta, device)
    )
    return Rope(cos, sin)


def full_rope(positions: Tensor, grid: tuple[int, int], head_dim: int, theta: float) -> Rope:
    """Rows and columns rotate ``2 * (head_dim // 6)`` channels each, frames the rest, as in Wan: ``(T, H*W, R/2)``."""
    of_frames, *sides = full_channels(head_dim)
    frames = _table(_angles(positions, of_frames, theta))
    parts = _axis_tables(grid, (sides[0], sides[1]), theta, positions.device)
    tables = []
    for frame, (row, column) in zip(frames, parts):
        space = _over_grid(row[:, None], column[None, :], grid)  # (S, side)
        T, S = len(frame), len(space)
        tables.append(torch.cat((frame[:, None].expand(T, S, -1), space.expand(T, S, -1)), -1))
    cos, sin = tables
    return Rope(cos, sin)


def _axis_tables(
    grid: tuple[int, int], channels: tuple[int, int], theta: float, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cosines, then sines, of rows ``(H, *)`` and columns ``(W, *)``."""
    row, column = (
        _table(_angles(torch.arange(n, dtype=torch.float64, device=device), d, theta)) for n, d in zip(grid, channels)
    )
    return (row[0], column[0]), (row[1], column[1])


def neighbor_bias(axes: Sequence[int], theta: float, heads: int, strength: float = 3.0) -> tuple[Tensor, Tensor]:
    """Biases of queries ``(heads, D)`` and keys ``(D,)`` that initialize rotary attention to the neighboring token.

    Keys get a vector in the two fastest rotating pairs of every axis, queries the same vector rotated by the angle of
    one token: the product peaks one token ahead or back along the head's axis. So positional attention starts as a
    convolution would, which ConViT (d'Ascoli et al. 2021) did with relative positions; left to itself, a small model
    takes most of its training to find that neighbors belong together.

    Args:
        axes: pairs of channels that rotate with each axis, in their order; together ``D / 2``.
        theta: base of the frequencies.
        heads: take turns in both directions of every axis.
        strength: of each channel pair, beside projections of unit size.
    """
    D = 2 * sum(axes)
    q, k = torch.zeros(heads, D), torch.zeros(D)
    first = 0
    for axis, pairs in enumerate(axes):
        for j in range(min(pairs, 2)):
            at, frequency = 2 * (first + j), theta ** (-j / pairs)
            k[at] = strength
            for head in range(heads):
                own, ahead = head // 2 % len(axes), 1 if head % 2 == 0 else -1
                angle = frequency * ahead if own == axis else 0.0
                q[head, at], q[head, at + 1] = strength * math.cos(angle), strength * math.sin(angle)
        first += pairs
    return q, k
