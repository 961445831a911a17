"""Rotary position embedding over frames and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdcore.norm import compute_dtype

Style = Literal["interleaved", "half"]
STYLES = {"interleaved": 1, "half": 2}  # with the numbers that kernels know them by


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary table (Su et al. 2021), one row per frame and token.

    The first ``R <= D`` channels are rotated, pair by pair: ``(a, b) -> (a cos - b sin, b cos + a sin)``. Pair ``r`` is
    the channels ``(2r, 2r+1)`` with style ``"interleaved"`` and ``(r, r + R/2)`` with ``"half"``.

    Args:
        cos, sin: ``(F or 1, S or 1, R/2)``, or ``(F or 1, S or 1, H, R/2)`` with angles of their own for every head.
            Key frame ``t`` uses row ``t``, query frame ``t`` row ``q_start + t``.
        style: which channels make a pair.
    """

    cos: Tensor
    sin: Tensor
    style: Style = "interleaved"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"Rope: style must be 'interleaved' or 'half', got {self.style!r}")
        if self.cos.shape != self.sin.shape:
            raise ValueError(
                f"Rope: sin must have the shape of cos, {tuple(self.cos.shape)}, got {tuple(self.sin.shape)}"
            )
        if self.cos.ndim not in (3, 4):
            raise ValueError(
                f"Rope: cos must be (F or 1, S or 1, R/2) or (F or 1, S or 1, H, R/2), got {tuple(self.cos.shape)}"
            )

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotates ``(B, T, S, heads, D)``, frame ``t`` by row ``start + t``; float32 at least."""
        dtype = compute_dtype(x.dtype)
        cos, sin = (self._rows(table, start, x.shape[1]).to(dtype) for table in (self.cos, self.sin))
        x = x.to(dtype)
        pairs = cos.shape[-1]
        rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.style == "interleaved":
            a, b = rotated.unflatten(-1, (pairs, 2)).unbind(-1)
        else:
            a, b = rotated[..., :pairs], rotated[..., pairs:]
        y = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(y, -1).flatten(-2) if self.style == "interleaved" else torch.cat(y, -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    @staticmethod
    def _rows(table: Tensor, start: int, frames: int) -> Tensor:
        """Rows of the given frames, broadcastable to ``(T, S, heads, R/2)``."""
        table = table if table.ndim == 4 else table.unsqueeze(2)
        return table if table.shape[0] == 1 else table[start : start + frames]


def axial_rope(
    grid: tuple[int, int, int],
    dims: tuple[int, int, int],
    theta: float = 1e4,
    start: int = 0,
    style: Style = "interleaved",
    device: torch.device | str | None = None,
) -> Rope:
    """The table of video models: some channels turn with the frame, some with the row, some with the column.

    Axis ``i`` has frequencies ``theta ** (-2 j / dims[i])`` for ``j < dims[i] / 2``; pairs are ordered frame, row,
    column.

    Args:
        grid: frames, rows and columns ``(T, H, W)`` of tokens.
        dims: rotated channels per axis, even; 0 leaves the axis unrotated.
        theta: base of the frequencies.
        start: position of the first frame.
        style: which channels make a pair.

    Returns:
        A float32 table ``(T, H*W, R/2)`` with ``R = sum(dims)``; ``T`` or ``H*W`` is 1 where nothing depends on it.
    """
    if len(grid) != 3 or any(n < 0 for n in grid):
        raise ValueError(f"axial_rope: grid must be three sizes (T, H, W), got {grid}")
    if len(dims) != 3 or any(d < 0 or d % 2 for d in dims) or not sum(dims):
        raise ValueError(f"axial_rope: dims must be three even numbers of channels, not all 0, got {dims}")
    T, H, W = grid
    T, H, W = T if dims[0] else 1, H if dims[1] or dims[2] else 1, W if dims[1] or dims[2] else 1
    t, y, x = torch.meshgrid(
        torch.arange(start, start + T, dtype=torch.float64, device=device),
        torch.arange(H, dtype=torch.float64, device=device),
        torch.arange(W, dtype=torch.float64, device=device),
        indexing="ij",
    )
    angles = []
    for position, d in zip((t, y, x), dims):
        if d:
            frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
            angles.append(position[..., None] * frequency)
    angle = torch.cat(angles, -1).flatten(1, 2)  # (T, H*W, R/2)
    return Rope(angle.cos().float(), angle.sin().float(), style)
