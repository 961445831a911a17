"""Keys and values of the frames that frames to come can still see: a ring per layer, for generation without end.

Under a chunk-causal window with sinks, chunk ``c`` sees the sink frames and the ``W = (past + 1) * chunk`` frames that
end with its own. Frame ``f < sink`` has slot ``f`` for ever, any other slot ``sink + (f - sink) % W``: the frames of a
chunk take the slots of the chunk that just fell out of the window. Until the ring is full its first slots are the
visible ones, afterwards all are; so attention reads it as it lies, in the order of slots, which softmax does not mind.
Nothing is shifted, and where to write is known on the host.

Keys lie in the ring normed and rotated by the positions of their frames; or, ``relative``, normed alone, and are
rotated when they are read, by where they are in the window: sinks from 0 on, then the frames of the window in their
order. So positions never leave those of training, and what comes out does not depend on how far a stream is.
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
        relative: keys are rotated when they are read.
    """

    runs: tuple[tuple[int, int, int], ...]
    visible: int
    relative: bool = False


@dataclass(eq=False)
class Slots:
    """Keys or values of one layer, ``(B, slots, S, G, D)``.

    Args:
        data: as they are stored; int8: ``round(x / scale)``.
        scale: of int8, ``(B, slots, 1, G, 1)`` float32: the largest magnitude of a frame and head over 127, so that a
            value errs by at most half of it, 1/254 of that magnitude.
    """

    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def write(self, x: Tensor, place: Place) -> Tensor:
        """Writes a chunk ``(B, chunk, S, G, D)``; returns all that it sees, in its dtype.

        A view of the ring where that holds x's dtype. With gradients, which reach the chunk alone, a copy, so that
        the ring may be written to again before backward.
        """
        data, scale = _encoded(x.detach(), self.data.dtype)
        for frame, slot, n in place.runs:
            self.data[:, slot : slot + n] = data[:, frame : frame + n]
            if self.scale is not None and scale is not None:
                self.scale[:, slot : slot + n] = scale[:, frame : frame + n]
        seen = self.data[:, : place.visible]
        if self.scale is not None:
            seen = seen * self.scale[:, : place.visible].to(x.dtype)
        seen = seen.to(x.dtype)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return seen
        parts, end = [], 0
        own = x - x.detach()  # 0, with x's gradient: the value stays what is stored
        for frame, slot, n in sorted(place.runs, key=lambda run: run[1]):
            parts += [seen[:, end:slot], seen[:, slot : slot + n] + own[:, frame : frame + n]]
            end = slot + n
        return torch.cat((*parts, seen[:, end:]), 1)


def _encoded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype != torch.int8:
        return x, None
    scale = x.abs().amax((2, 4), keepdim=True).float().clamp(min=1e-30) / 127
    return (x / scale).round().to(torch.int8), scale


@dataclass(eq=False)
class Ring:
    """The slots of one layer: keys, normed and, but with ``relative``, rotated; and values."""

    k: Slots
    v: Slots

    def write(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Writes a chunk ``(B, chunk, S, G, D)``; returns the keys and values that it sees."""
        return self.k.write(k, place), self.v.write(v, place)


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
        relative: keys are rotated when they are read.
    """

    mask: FrameMask
    slots: int
    batch: int
    grid: tuple[int, int]
    rings: list[Ring | None] = field(repr=False)
    frames: int = 0
    relative: bool = False

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
        return Place(tuple(runs), min(end, self.slots), self.relative)

    def positions(self, T: int, device: torch.device) -> Tensor:
        """``(visible + T,)``, float64: positions in the window of what lies in the visible slots, then of the next
        chunk's T frames. Made on the device: the host does not wait."""
        end, sink = self.frames + T, self.mask.sink
        if end <= self.slots:
            slots = torch.arange(end, dtype=torch.float64, device=device)
            return torch.cat((slots, slots[-T:]))
        window = self.slots - sink
        slots = torch.arange(window, dtype=torch.float64, device=device)
        oldest = (end - sink) % window  # the slot, after the sinks, of the first frame of the window
        whole = torch.arange(self.slots, dtype=torch.float64, device=device)
        return torch.cat((whole[:sink], sink + (slots - oldest) % window, whole[-T:]))


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
    B, slots, _, G, _ = shape

    def new() -> Slots:
        scale = torch.zeros(B, slots, 1, G, 1, device=device) if dtype == torch.int8 else None
        return Slots(torch.zeros(shape, dtype=dtype, device=device), scale)

    return Ring(new(), new())
