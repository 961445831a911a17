"""Keys and values of the frames that frames to come can still see: a ring per layer, for generation without end.

Under a chunk-causal window with sinks, chunk ``c`` sees the sink frames and the ``W = (past + 1) * chunk`` frames that
end with its own. Frame ``f < sink`` has slot ``f`` for ever, any other slot ``sink + (f - sink) % W``: the frames of a
chunk take the slots of the chunk that just fell out of the window. Until the ring is full its first slots are the
visible ones, afterwards all are; so attention reads it as it lies, in the order of slots, which softmax does not mind.
Nothing is shifted, and where to write is known on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdcore.mask import FrameMask


@dataclass(frozen=True)
class Place:
    """Where the frames of a chunk go, and how many slots they see.

    Args:
        runs: ``(first frame of the chunk, first slot, frames)``.
        visible: slots that the chunk sees, from the first on.
    """

    runs: tuple[tuple[int, int, int], ...]
    visible: int


@dataclass(eq=False)
class Ring:
    """The slots of one layer: k and v ``(B, slots, S, G, D)``; keys are normed and rotated."""

    k: Tensor
    v: Tensor

    def write(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Writes a chunk ``(B, chunk, S, G, D)``; returns the keys and values that it sees, views of the ring."""
        for frame, slot, n in place.runs:
            self.k[:, slot : slot + n] = k[:, frame : frame + n]
            self.v[:, slot : slot + n] = v[:, frame : frame + n]
        return self.k[:, : place.visible], self.v[:, : place.visible]


@dataclass(eq=False)
class FrameCache:
    """What a stream remembers: a ring per block that looks across frames, and the number of frames kept.

    A chunk that is not kept is written too, into the slots that it will have: only frames that it cannot see are lost.

    Args:
        mask: chunk-causal, ``future=0``.
        slots: frames that fit.
        batch, grid: of the stream: samples, rows and columns of tokens.
        rings: one per block, None where the block does not look across frames.
        frames: kept so far.
    """

    mask: FrameMask
    slots: int
    batch: int
    grid: tuple[int, int]
    rings: list[Ring | None] = field(repr=False)
    frames: int = 0

    @property
    def nbytes(self) -> int:
        """Memory of all rings."""
        return sum(x.nbytes for ring in self.rings if ring is not None for x in (ring.k, ring.v))

    def reset(self) -> None:
        """Forgets all frames; the memory stays."""
        self.frames = 0

    def place(self, T: int) -> Place:
        """Where the next chunk of T frames goes.

        Raises:
            ValueError: if T is not the mask's chunk, or the past is unlimited and the slots are used up.
        """
        if self.mask.chunk != T:
            raise ValueError(f"FrameCache: a chunk must have mask.chunk = {self.mask.chunk} frames, got {T}")
        end = self.frames + T
        if self.mask.past is None and end > self.slots:
            raise ValueError(f"FrameCache: made for at most {self.slots} frames, got frame {end}")
        runs: list[tuple[int, int, int]] = []
        for t in range(T):
            slot = slot_of(self.frames + t, self.slots, self.mask.sink)
            if runs and runs[-1][1] + runs[-1][2] == slot:
                first, start, n = runs[-1]
                runs[-1] = first, start, n + 1
            else:
                runs.append((t, slot, 1))
        return Place(tuple(runs), min(end, self.slots))


def slot_of(frame: int, slots: int, sink: int) -> int:
    """Sinks stay; all others go round in the slots after them."""
    return frame if frame < slots else sink + (frame - sink) % (slots - sink)


def slots_needed(mask: FrameMask, frames: int | None) -> int:
    """Slots of a ring for the mask.

    Args:
        frames: the longest stream; needed if the past is unlimited.

    Raises:
        ValueError: if the mask is not causal, or the past unlimited and ``frames`` None.
    """
    if mask.future != 0:
        raise ValueError(f"new_cache: the model's mask must be causal by chunks, future=0, got {mask}")
    if mask.clean or mask.shots:
        raise ValueError(f"new_cache: the model's mask must have neither shots nor a clean half, got {mask}")
    if mask.past is not None:
        return mask.sink + (mask.past + 1) * mask.chunk
    if frames is None:
        raise ValueError(
            f"new_cache: frames must be the length of the longest stream where mask.past is None, got {mask}"
        )
    return -(-frames // mask.chunk) * mask.chunk


def new_ring(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> Ring:
    """``shape``: (B, slots, S, G, D)."""
    return Ring(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
