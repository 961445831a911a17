"""The one place where tokens change between the layout of spatial and of temporal attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vdcore.parallel.peers import Peers, part_sizes
from vdcore.parallel.switch import Started, frames_and_tokens, gather_along, moved, start_move

Layout = Literal["frames", "tokens"]


@dataclass(frozen=True)
class Split:
    """How the processes of a mesh share a forward pass.

    Args:
        sizes: T' and S of the whole.
        plan: of full or of temporal attention: see :mod:`vdcore.parallel.plan`.
    """

    peers: Peers
    sizes: tuple[int, int]
    plan: str

    @property
    def own(self) -> tuple[int, int]:
        """The first of this rank's frames, and how many they are."""
        return self.peers.start(self.sizes[0]), self.peers.size(self.sizes[0])

    def own_frames(self, x: Tensor, dim: int) -> Tensor:
        """Of what stands for all frames, this rank's."""
        start, size = self.own
        return x.narrow(dim, start, size)

    def all_frames(self, x: Tensor, dim: int) -> Tensor:
        """What every rank has of its own frames, for all of them."""
        return gather_along(x, self.peers, dim, part_sizes(self.sizes[0], self.peers.ranks))


def start_switch(x: Tensor, source: Layout, target: Layout, split: Split) -> Started:
    """As :func:`switch_layout`; what does not need the result is computed before ``.finish()``."""
    return start_move(x, frames_and_tokens(split.peers, split.sizes, source, target))


def switch_layout(x: Tensor, source: Layout, target: Layout, split: Split | None) -> Tensor:
    """Brings tokens into the layout that the next layer wants.

    On one device this is nothing: every operator reads ``(B, T, S, C)`` where it lies. On several, frames are split
    over ranks for spatial attention and tokens for temporal attention, and the switch is one all-to-all (dynamic
    sequence parallelism, Zhao et al. 2024).

    Args:
        x: ``(B, T, S, C)``, or of its frames or tokens this rank's.
        source, target: ``"frames"``: this rank has whole frames; ``"tokens"``: all frames of some positions.
        split: None: one process.

    Returns:
        ``(B, T_r, S, C)`` or ``(B, T, S_r, C)``.
    """
    if split is None or source == target:
        return x
    return moved(x, frames_and_tokens(split.peers, split.sizes, source, target))
