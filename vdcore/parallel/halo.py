"""Frames that a rank's queries see and others hold: which, where they stand, and their exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask, Run
from vdcore.parallel.messages import flattened, refuse_transforms, spread, start_exchange, wait
from vdcore.parallel.peers import Peers, part_sizes, part_starts

PLAIN = {"past", "future", "chunk", "sink"}


def shifts(mask: FrameMask) -> bool:
    """Frames may be counted from another one on, a multiple of the chunk away: nothing but chunks and a sink count."""
    others = [f for f in fields(mask) if f.name not in PLAIN]
    return all(getattr(mask, f.name) == f.default for f in others)


@lru_cache(maxsize=256)
def seen_by(mask: FrameMask, T: int, ranks: int) -> tuple[tuple[Run, ...], ...]:
    """For each rank the frames that its own frames see, as sorted runs."""
    found = []
    for start, size in zip(part_starts(T, ranks), part_sizes(T, ranks)):
        seen: list[Run] = []
        for begin, end in sorted(run for runs in mask.runs(size, T, start) for run in runs):
            if seen and begin <= seen[-1][1]:
                seen[-1] = seen[-1][0], max(end, seen[-1][1])
            else:
                seen.append((begin, end))
        found.append(tuple(seen))
    return tuple(found)


def within(runs: tuple[Run, ...], begin: int, end: int) -> tuple[Run, ...]:
    cut = [(max(a, begin), min(b, end)) for a, b in runs]
    return tuple((a, b) for a, b in cut if a < b)


def frames_in(runs: tuple[Run, ...]) -> int:
    return sum(end - begin for begin, end in runs)


@dataclass(frozen=True)
class Halo:
    """The key frames of one rank in one tensor, and the messages that bring them.

    Seen frames stand at their own index less ``gap``, a multiple of the chunk, but for a sink, which stays at 0: so
    the mask says of them what it says of the whole video. What is between the sink and the next multiple of the chunk
    is seen by nobody, and never filled.

    Args:
        frames: T of the whole.
        seen: by rank, the frames that it sees.
        sink: where the window begins in the tensor.
        gap: frames left out between the sink and the window.
        length: key frames in the tensor.
    """

    peers: Peers
    frames: int
    seen: tuple[tuple[Run, ...], ...]
    sink: int
    gap: int
    length: int

    @property
    def own(self) -> Run:
        start = self.peers.start(self.frames)
        return start, start + self.peers.size(self.frames)

    @property
    def q_start(self) -> int:
        return max(self.own[0] - self.gap, 0)

    def message(self, source: int, target: int) -> tuple[Run, ...]:
        """The frames that one rank sends another."""
        if source == target:
            return ()
        start = part_starts(self.frames, self.peers.ranks)[source]
        return within(self.seen[target], start, start + part_sizes(self.frames, self.peers.ranks)[source])

    @property
    def silent(self) -> bool:
        """No rank sees a frame of another."""
        return _silent(self)

    @property
    def in_place(self) -> bool:
        """The key frames are this rank's own, and nothing else."""
        begin, end = self.own
        return self.silent and (self.at(begin), self.length) == (0, end - begin)

    def at(self, frame: int) -> int:
        """Where a seen frame stands."""
        return frame if frame < self.sink else frame - self.gap

    def lengths(self, lengths: Tensor | None) -> Tensor | None:
        """Valid frames ``(B,)`` of the whole as valid frames of the tensor."""
        if lengths is None or not self.gap:
            return lengths
        return torch.maximum(lengths - self.gap, lengths.clamp(max=self.sink))


@lru_cache(maxsize=256)
def _silent(halo: Halo) -> bool:
    ranks = range(halo.peers.ranks)
    return not any(halo.message(i, j) for i in ranks for j in ranks)


@lru_cache(maxsize=256)
def halo_of(mask: FrameMask, T: int, peers: Peers) -> Halo:
    seen = seen_by(mask, T, peers.ranks)
    mine = seen[peers.rank]
    if not mine:
        return Halo(peers, T, seen, 0, 0, 0)
    sink, gap = 0, 0
    if shifts(mask) and len(mine) <= 2:
        first, window = mine[0], mine[-1][0]
        sink = -(-first[1] // mask.chunk) * mask.chunk if len(mine) == 2 else 0
        aligned = window // mask.chunk * mask.chunk
        gap = max(aligned - sink, 0)
        sink = sink if gap else 0
    return Halo(peers, T, seen, sink, gap, mine[-1][1] - gap)


def _exchanged(halo: Halo, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    start, outs = halo.own[0], []
    for x in tensors:
        out = torch.empty((x.shape[0], halo.length, *x.shape[2:]), dtype=x.dtype, device=x.device)
        if x.shape[1]:
            out[:, halo.at(start) : halo.at(start) + x.shape[1]] = x
        outs.append(out)
    if not halo.silent:
        flat = flattened(_pieces(tensors, halo, _sent), tensors[0])
        flat = wait(start_exchange(flat, *_counts(halo, tensors), halo.peers), halo.peers)
        spread(flat, _pieces(outs, halo, _received), torch.Tensor.copy_)
    return tuple(outs)


class _Exchange(torch.autograd.Function):
    """Own frames ``(B, T_r, ...)`` of tensors to all key frames ``(B, length, ...)``, by one all-to-all.

    Compiled, every rank has a graph of its own, whose compiler knows nothing of the others: an exchange that nothing
    uses it drops, and one in backward that no incoming gradient goes into it runs in forward. So a piece without frames
    of every tensor is among those that are sent and received, and binds the exchange on all ranks alike.
    """

    @staticmethod
    def forward(ctx: Any, halo: Halo, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.halo = halo
        return _exchanged(halo, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        halo: Halo = ctx.halo
        start, end = halo.own
        at = halo.at(start) if end > start else 0
        own = [dy[:, at : at + end - start].to(torch.promote_types(dy.dtype, torch.float32), copy=True) for dy in grads]
        if not halo.silent:
            received, sent = _counts(halo, grads)
            flat = flattened(_pieces(grads, halo, _received), grads[0])
            flat = wait(start_exchange(flat, sent, received, halo.peers), halo.peers)
            spread(flat, _pieces(own, halo, _sent), torch.Tensor.add_)
        return None, *(dx.to(dy.dtype) for dx, dy in zip(own, grads))


Runs = Callable[[Halo, int], list[Run]]


def _sent(halo: Halo, rank: int) -> list[Run]:
    """Own frames that another rank gets, where they stand among the own."""
    start = halo.own[0]
    return [(a - start, b - start) for a, b in halo.message(halo.peers.rank, rank)]


def _received(halo: Halo, rank: int) -> list[Run]:
    """Frames that come from another rank, where they stand among the key frames."""
    return [(halo.at(a), halo.at(a) + b - a) for a, b in halo.message(rank, halo.peers.rank)]


def _pieces(tensors: Sequence[Tensor], halo: Halo, runs: Runs) -> list[Tensor]:
    """Views of frames to or from each rank, of all tensors, rank by rank; before them one of none of each tensor."""
    found = [x[:, :0] for x in tensors]
    for rank in range(halo.peers.ranks):
        found += [x[:, a:b] for x in tensors for a, b in runs(halo, rank)]
    return found


def _counts(halo: Halo, tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Elements to and from each rank."""
    ranks, rank = range(halo.peers.ranks), halo.peers.rank
    frame = sum(torch.Size([x.shape[0], *x.shape[2:]]).numel() for x in tensors)
    sent = [frames_in(halo.message(rank, j)) * frame for j in ranks]
    return sent, [frames_in(halo.message(i, rank)) * frame for i in ranks]


def key_frames(halo: Halo, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keys and values, each ``(B, T_r, S, G, D)`` of this rank's frames, with those that it sees of others.

    Args:
        tensors: of one dtype, in one message.

    Returns:
        ``(B, length, S, G, D)`` each; as they are where nobody sees another's frames. Differentiable: gradients of
        frames go back to the rank that holds them and are summed there in float32, in the order of ranks.
    """
    if halo.in_place:
        return tensors
    refuse_transforms("video_attention", *tensors)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _exchanged(halo, tensors)
    return _Exchange.apply(halo, *tensors)
