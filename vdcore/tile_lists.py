"""Which tiles of tokens see which: lists of key tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileLists:
    """For every batch, head and query tile the key tiles that it sees.

    Args:
        indices: int32 ``(B or 1, H or 1, n, K)``: ascending, each at most once; what comes after the count is ignored.
        counts: int32 ``(B or 1, H or 1, n)``; 0: the tile's tokens see nothing.
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        for name, dims, rank in (("indices", "(B or 1, H or 1, n, K)", 4), ("counts", "(B or 1, H or 1, n)", 3)):
            x = getattr(self, name)
            if not isinstance(x, Tensor):
                raise TypeError(f"TileLists: {name} must be a tensor, got {type(x).__name__}")
            if x.dtype != torch.int32:
                raise TypeError(f"TileLists: {name} must be int32, got {x.dtype}")
            if x.ndim != rank:
                raise ValueError(f"TileLists: {name} must be {dims}, got {tuple(x.shape)}")
        if self.indices.shape[:3] != self.counts.shape:
            raise ValueError(
                f"TileLists: counts must be {tuple(self.indices.shape[:3])}, as indices without K, got "
                f"{tuple(self.counts.shape)}"
            )
