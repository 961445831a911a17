"""Attention over frames that others hold, a shard of keys and values at a time (Liu et al. 2023, ring attention).

Shards pass from rank to rank, each on its way while attention to the one before it computes, and no further than the
mask shows them. Partial results are merged by their lse. A rank holds two shards of keys and values at most, forward
and backward: backward lets them pass again, computes each part of attention once more, and sends gradients straight to
the rank whose keys they are. From the out and lse of the whole a plain backward would do without forward; the kernels'
would not: they take the error of a rounded out off dq by what a row of dS adds up to, which only all keys tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask, Run
from vdcore.ops import video_attention
from vdcore.parallel.halo import frames_in, shifts, within
from vdcore.parallel.messages import refuse_transforms, start_exchange, wait
from vdcore.parallel.peers import Peers, part_sizes, part_starts


@dataclass(frozen=True)
class Piece:
    """One call of attention: query frames, key frames of a shard, and the mask between them."""

    queries: Run
    keys: Run
    mask: FrameMask
    q_start: int


@dataclass(frozen=True)
class Ring:
    """The way of every shard around the ring.

    Args:
        frames: T of the whole.
        scale: of the scores.
        backend: of attention.
    """

    peers: Peers
    frames: int
    mask: FrameMask
    scale: float | None
    backend: str | None

    def shard(self, rank: int) -> Run:
        start = part_starts(self.frames, self.peers.ranks)[rank]
        return start, start + part_sizes(self.frames, self.peers.ranks)[rank]

    def holder(self, step: int, rank: int) -> int:
        """Whose shard a rank has after so many steps."""
        return (rank - step) % self.peers.ranks

    def pieces(self, rank: int, shard: int) -> tuple[Piece, ...]:
        """What a rank computes of a shard; nothing where it sees none of it."""
        return pieces_of(self.mask, self.frames, self.shard(rank), self.shard(shard))

    def reach(self, shard: int) -> int:
        """How many steps a shard goes: to the last rank that sees it."""
        N = self.peers.ranks
        return max((d for d in range(1, N) if self.pieces((shard + d) % N, shard)), default=0)

    @property
    def steps(self) -> int:
        return max(self.reach(shard) for shard in range(self.peers.ranks))

    def passes(self, step: int, rank: int) -> bool:
        """A shard arrives at this rank in this step."""
        return self.reach(self.holder(step, rank)) >= step and frames_in((self.shard(self.holder(step, rank)),)) > 0

    def returns(self, step: int, rank: int) -> bool:
        """This rank sends gradients of the shard that it has after so many steps to the shard's owner."""
        return step > 0 and bool(self.pieces(rank, self.holder(step, rank)))


@lru_cache(maxsize=1024)
def pieces_of(mask: FrameMask, T: int, queries: Run, keys: Run) -> tuple[Piece, ...]:
    """Attention between two runs of frames of a video of T frames, as calls on those frames alone."""
    (q0, q1), (k0, k1) = queries, keys
    rows = [within(runs, k0, k1) for runs in mask.runs(q1 - q0, T, q0)]
    if not any(rows):
        return ()
    size = k1 - k0
    if all(runs == ((k0, k1),) for runs in rows):
        return (Piece((0, q1 - q0), (0, size), FrameMask(), 0),)
    if shifts(mask) and q0 >= k0 and k0 % mask.chunk == 0:
        moved = replace(mask, sink=max(mask.sink - k0, 0))
        return (Piece((0, q1 - q0), (0, size), moved, q0 - k0),)
    found, first = [], 0
    for t in range(1, len(rows) + 1):
        if t == len(rows) or rows[t] != rows[first]:
            found += [Piece((first, t), (a - k0, b - k0), FrameMask(), 0) for a, b in rows[first]]
            first = t
    return tuple(found)


def attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece, ring: Ring) -> tuple[Tensor, Tensor]:
    """A part of attention: out ``(B, t, S, H, D)`` and lse ``(B, t, S, H)`` of the piece's query frames."""
    (q0, q1), (k0, k1) = piece.queries, piece.keys
    return video_attention(
        q[:, q0:q1],
        k[:, k0:k1],
        v[:, k0:k1],
        mask=piece.mask,
        q_start=piece.q_start,
        scale=ring.scale,
        return_lse=True,
        backend=ring.backend,
    )


class Merging:
    """Partial results on their way to one: ``sum_i exp(lse_i - m) out_i``, ``sum_i exp(lse_i - m)`` and m, the largest.

    As a kernel holds them (Milakov and Gimelshein 2018): an lse that were added up part by part would be rounded by
    every part, and its error is a relative one of the result.
    """

    def __init__(self, q: Tensor) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = torch.zeros(q.shape, dtype=wide, device=q.device)
        self.sum = torch.zeros(q.shape[:-1], dtype=wide, device=q.device)
        self.top = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)

    def add(self, frames: Run, out: Tensor, lse: Tensor) -> None:
        whole, total, top = (x[:, frames[0] : frames[1]] for x in (self.out, self.sum, self.top))
        largest = torch.maximum(top, lse)
        before, more = weight(top, largest), weight(lse, largest)
        whole.mul_(before[..., None]).add_(out * more[..., None])
        total.mul_(before).add_(more)
        top.copy_(largest)

    def result(self) -> tuple[Tensor, Tensor]:
        """Out and lse, both float32 at least; 0 and -inf where nothing was seen."""
        return self.out / self.sum.clamp(min=1)[..., None], self.top + self.sum.log()


def weight(lse: Tensor, total: Tensor) -> Tensor:
    """Share of a part in the whole; 0 where there is nothing."""
    return torch.where(lse == -torch.inf, 0.0, (lse - total).exp())


def _passing(ring: Ring, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    """Step by step the keys and values that are here, None where none came; the next are on their way meanwhile."""
    peers, (B, _, S, G, D) = ring.peers, k.shape
    rank, N = peers.rank, peers.ranks

    def count(step: int, at: int) -> int:
        begin, end = ring.shard(ring.holder(step, at))
        return 2 * B * (end - begin) * S * G * D if ring.passes(step, at) else 0

    def views(flat: Tensor, step: int) -> tuple[Tensor, Tensor]:
        begin, end = ring.shard(ring.holder(step, rank))
        both = flat.view(2, B, end - begin, S, G, D)
        return both[0], both[1]

    here: tuple[Tensor | None, Tensor | None] = (k, v)
    flat = torch.stack((k, v)).view(-1) if ring.steps and count(1, (rank + 1) % N) else k.new_empty(0)
    for step in range(ring.steps + 1):
        on_the_way = None
        if step < ring.steps:
            sent, received = [0] * N, [0] * N
            sent[(rank + 1) % N], received[(rank - 1) % N] = count(step + 1, (rank + 1) % N), count(step + 1, rank)
            leaves = flat if sent[(rank + 1) % N] else flat[:0]
            on_the_way = start_exchange(leaves, sent, received, peers)
        yield step, *here
        if on_the_way is not None:
            flat = wait(on_the_way, peers)
            here = views(flat, step + 1) if ring.passes(step + 1, rank) else (None, None)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        merging = Merging(q)
        for step, k_i, v_i in _passing(ring, k, v):
            for piece in ring.pieces(ring.peers.rank, ring.holder(step, ring.peers.rank)):
                assert k_i is not None and v_i is not None
                merging.add(piece.queries, *attend(q, k_i, v_i, piece, ring))
        out, lse = merging.result()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ring, (q, k, v, out, lse) = ctx.ring, ctx.saved_tensors
        wide = lse.dtype
        dout, dlse = grads
        # Of the scores' gradient P (dP - delta): what every part of attention takes from its own out and lse.
        delta = dlse - (dout.to(wide) * out).sum(-1)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dkv = torch.zeros((2, *k.shape), dtype=wide, device=k.device)
        home: Tensor | None = None
        for step, k_i, v_i in _passing(ring, k, v):
            found = _backward_of_shard(ring, step, (q, k_i, v_i), dout, lse, delta, dq)
            if step == 0:
                if found is not None:
                    dkv += found
                continue
            if home is not None:
                _add_home(dkv, wait(home, ring.peers))
            home = _send_home(ring, step, found, k)
        if home is not None:
            _add_home(dkv, wait(home, ring.peers))
        return dq.to(q.dtype), *dkv.to(k.dtype).unbind(0), None


def _backward_of_shard(
    ring: Ring, step: int, qkv: Any, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> Tensor | None:
    """Adds to dq, and returns gradients ``(2, B, T_i, S, G, D)`` of the shard's keys and values; None: sees none."""
    rank = ring.peers.rank
    pieces = ring.pieces(rank, ring.holder(step, rank))
    if not pieces:
        return None
    q, k, v = (x.detach() for x in qkv)
    dkv = torch.zeros((2, *k.shape), dtype=dq.dtype, device=k.device)
    for piece in pieces:
        (q0, q1), (k0, k1) = piece.queries, piece.keys
        leaves = [x.detach().requires_grad_() for x in (q[:, q0:q1], k[:, k0:k1], v[:, k0:k1])]
        whole = replace(piece, queries=(0, q1 - q0), keys=(0, k1 - k0))
        with torch.enable_grad():
            part, part_lse = attend(leaves[0], leaves[1], leaves[2], whole, ring)
        share = weight(part_lse.detach(), lse[:, q0:q1])
        d = dout[:, q0:q1]
        given = (d * share[..., None]).to(d.dtype)
        given_lse = share * (delta[:, q0:q1] + (d.to(delta.dtype) * part.detach()).sum(-1))
        found = torch.autograd.grad((part, part_lse), leaves, (given, given_lse))
        dq[:, q0:q1] += found[0]
        dkv[0, :, k0:k1] += found[1]
        dkv[1, :, k0:k1] += found[2]
    return dkv


def _send_home(ring: Ring, step: int, found: Tensor | None, k: Tensor) -> Tensor:
    """Starts the way of a shard's gradients to its owner, in the dtype of the keys."""
    N, rank = ring.peers.ranks, ring.peers.rank
    sent, received = [0] * N, [0] * N
    flat = k.new_empty(0) if found is None else found.to(k.dtype).view(-1)
    sent[ring.holder(step, rank)] = flat.numel()
    other = (rank + step) % N
    received[other] = 2 * k.numel() if ring.returns(step, other) else 0
    return start_exchange(flat, sent, received, ring.peers)


def _add_home(dkv: Tensor, flat: Tensor) -> None:
    if flat.numel():
        dkv += flat.view(dkv.shape)


# Compiled, every rank would have a graph of its own, and a partitioner that moves messages between forward and backward
# as suits the one rank: they would no longer meet.
@torch.compiler.disable(reason="ring attention runs between graphs: its messages differ from rank to rank")
def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """Video attention of this rank's frames to all that the mask shows: out ``(B, T_r, S, H, D)`` and lse.

    q ``(B, T_r, S, H, D)``, k and v ``(B, T_r, S, G, D)``, normalized and rotated; lse is float32 at least,
    ``(B, T_r, S, H)``, and differentiable.
    """
    refuse_transforms("video_attention", q, k, v)
    return _RingAttention.apply(q, k, v, ring)
