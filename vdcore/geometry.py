"""Token layouts: how a host's sequence becomes frames and tokens, without a copy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def as_frames(x: Tensor, frames: int, layout: Literal["BNHD", "BHND"] = "BNHD") -> Tensor:
    """Views a sequence of ``N = frames * S`` tokens as frames: ``(B, T, S, H, D)``, never copied.

    Args:
        x: ``(B, N, H, D)``, or ``(B, H, N, D)`` with ``layout="BHND"``; frames come one after another.
        frames: T; it divides N.

    Raises:
        ValueError: if N is not a multiple of ``frames``, or the layout or rank is another.
    """
    if layout not in ("BNHD", "BHND"):
        raise ValueError(f"as_frames: layout must be 'BNHD' or 'BHND', got {layout!r}")
    if x.ndim != 4:
        raise ValueError(f"as_frames: x must have 4 dimensions, {layout}, got {tuple(x.shape)}")
    axis = 1 if layout == "BNHD" else 2
    if frames < 1 or x.shape[axis] % frames:
        raise ValueError(f"as_frames: frames must divide the {x.shape[axis]} tokens of x, got {frames}")
    # Splitting one axis into two is a view for every stride.
    x = x.unflatten(axis, (frames, x.shape[axis] // frames))
    return x if layout == "BNHD" else x.permute(0, 2, 3, 1, 4)
