"""The one place where tokens change between the layout of spatial and of temporal attention."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Layout = Literal["space", "time", "any"]


def switch_layout(x: Tensor, layout: Layout) -> Tensor:
    """Brings tokens into the layout that the next layer wants.

    On one device this is nothing: every operator reads ``(B, T, S, C)`` where it lies. It is the seam of context
    parallelism: with frames sharded over devices for ``"space"`` (each has whole frames) and tokens for ``"time"``
    (each has whole tracks of its positions), the switch is one all-to-all (dynamic sequence parallelism, Zhao et al.
    2024).

    Args:
        x: ``(B, T, S, C)``.
        layout: ``"space"``: all tokens of a frame together; ``"time"``: all frames of a token together; ``"any"``: the
            layer works token by token.

    Returns:
        ``(B, T, S, C)``.
    """
    return x
