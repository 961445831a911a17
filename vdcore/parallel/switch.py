"""From one split to another: whole frames, whole positions, whole heads, or everything on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.check import check_tensor, shape_of, wrong
from vdcore.parallel.messages import all_gather, counts_along, pack, refuse_transforms, start_exchange, unpack, wait
from vdcore.parallel.peers import Dim, Peers, check_dim, check_sizes, part_sizes, peers_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Move:
    """From tensors split along one dimension to tensors split along another, by one all-to-all.

    Args:
        source, target: dimensions that are split before and after.
        source_sizes, target_sizes: by rank, of these dimensions.
    """

    peers: Peers
    source: int
    source_sizes: tuple[int, ...]
    target: int
    target_sizes: tuple[int, ...]

    def back(self) -> Move:
        return Move(self.peers, self.target, self.target_sizes, self.source, self.source_sizes)

    def start(self, x: Tensor) -> Tensor:
        """Sends x, ``source`` split and ``target`` whole."""
        rank = self.peers.rank
        sent = counts_along(x.shape, self.target, self.target_sizes)
        shape = list(x.shape)
        shape[self.target] = self.target_sizes[rank]
        received = counts_along(shape, self.source, self.source_sizes)
        return start_exchange(pack(x, self.target, self.target_sizes), sent, received, self.peers)

    def finish(self, started: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What was sent, with ``source`` whole and ``target`` split; ``shape``: of what this rank sent."""
        whole = list(shape)
        whole[self.source] = sum(self.source_sizes)
        whole[self.target] = self.target_sizes[self.peers.rank]
        return unpack(wait(started, self.peers), whole, self.source, self.source_sizes)

    def over(self, x: Tensor) -> Tensor:
        """There at once."""
        return self.finish(self.start(x), tuple(x.shape))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move) -> Tensor:
        ctx.move = move
        return move.over(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.move.back().over(grads[0]), None


@dataclass(eq=False)
class _Way:
    """What is under way, and the shape of what was sent: forward, then backward. Uneven parts come in other sizes than
    they go, so autograd, which compares sizes, is given an empty tensor in their place."""

    move: Move
    there: tuple[Tensor, tuple[int, ...]] | None = None
    back: tuple[Tensor, tuple[int, ...]] | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way, way.there = way, (way.move.start(x), tuple(x.shape))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """What was between start and finish has computed its gradients while the exchange ran."""
        started, ctx.way.back = ctx.way.back, None
        return ctx.way.move.back().finish(*started), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, empty: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        assert way.there is not None
        started, way.there = way.there, None
        return way.move.finish(*started)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        ctx.way.back = ctx.way.move.back().start(dy), tuple(dy.shape)
        return dy.new_empty(0), None


@dataclass(frozen=True, eq=False)
class Started:
    """A switch under way: compute what does not need it, then :meth:`finish`, once."""

    result: Tensor
    way: _Way | None = None

    def finish(self) -> Tensor:
        return self.result if self.way is None else _Finish.apply(self.result, self.way)


def start_move(x: Tensor, move: Move) -> Started:
    """Differentiable: backward starts the way back where this is finished, and finishes it where this is started.

    Compiled it is one exchange, which the compiler may reorder.
    """
    if move.peers.ranks == 1:
        return Started(x)
    refuse_transforms("switch", x)
    if torch.compiler.is_compiling():
        return Started(_Move.apply(x, move))
    way = _Way(move)
    return Started(_Start.apply(x, way), way)


def moved(x: Tensor, move: Move) -> Tensor:
    if move.peers.ranks == 1:
        return x
    refuse_transforms("switch", x)
    return _Move.apply(x, move)


def frames_and_tokens(peers: Peers, sizes: tuple[int, int], source: str, target: str) -> Move:
    """Between frame shards and token shards of ``(B, T, S, ...)``."""
    dims = {"frames": (1, part_sizes(sizes[0], peers.ranks)), "tokens": (2, part_sizes(sizes[1], peers.ranks))}
    return Move(peers, *dims[source], *dims[target])


def check_part(op: str, x: Tensor, peers: Peers, sizes: tuple[int, int], dim: str) -> None:
    """x is this rank's part of ``(B, T, S, ...)``, split along ``dim``."""
    if x.ndim < 3:
        wrong(op, "x", "(B, T, S, ...)", shape_of(x))
    expected = [*sizes]
    axis = check_dim(op, "dim", dim)
    expected[axis - 1] = peers.size(sizes[axis - 1])
    if tuple(x.shape[1:3]) != tuple(expected):
        what = f"{dim} of rank {peers.rank} of {peers.ranks}: (B, {expected[0]}, {expected[1]}, ...)"
        wrong(op, "x", f"the {what}, of sizes (T, S) = {sizes}", shape_of(x))


# ---- Public ----


def shard(x: Tensor, mesh: DeviceMesh, dim: Dim = "frames") -> Tensor:
    """This rank's part of a tensor that every rank holds whole: a view. Nothing is sent.

    Of n over N ranks the first ``n % N`` hold one more (``numpy.array_split``); a rank may hold none.

    Args:
        x: ``(B, T, S, ...)``.
        mesh: a ``DeviceMesh`` of one dimension.
        dim: ``"frames"`` splits T, ``"tokens"`` splits S.

    Returns:
        ``(B, T_r, S, ...)`` or ``(B, T, S_r, ...)``.

    Raises:
        ValueError, TypeError: another shape, dim or mesh.
    """
    peers, axis = peers_of("shard", mesh), check_dim("shard", "dim", dim)
    if check_tensor("shard", "x", x).ndim < 3:
        wrong("shard", "x", "(B, T, S, ...)", shape_of(x))
    n = x.shape[axis]
    return x.narrow(axis, peers.start(n), peers.size(n))


def start_switch(
    x: Tensor, mesh: DeviceMesh, sizes: tuple[int, int], source: Dim = "frames", target: Dim = "tokens"
) -> Started:
    """As :func:`switch`, without waiting: ``.finish()`` gives the result. Backward overlaps in the same way."""
    move = _checked("switch", x, mesh, sizes, source, target)
    return Started(x) if source == target else start_move(x, move)


def _checked(op: str, x: Tensor, mesh: DeviceMesh, sizes: tuple[int, int], source: str, target: str) -> Move:
    peers, sizes = peers_of(op, mesh), check_sizes(op, sizes)
    check_dim(op, "source", source)
    check_dim(op, "target", target)
    check_part(op, check_tensor(op, "x", x), peers, sizes, source)
    return frames_and_tokens(peers, sizes, source, target)


def switch(
    x: Tensor, mesh: DeviceMesh, sizes: tuple[int, int], source: Dim = "frames", target: Dim = "tokens"
) -> Tensor:
    """From frames split over ranks to tokens split over ranks, or back, by one all-to-all (dynamic sequence
    parallelism, Zhao et al. 2024): spatial attention needs whole frames, temporal attention whole positions.

    Each rank sends ``1 - 1/N`` of its part. Sizes are not exchanged, the host does not wait. Backward is the reverse
    exchange: every rank must run it. With one sample, one of the two sides of an exchange is a view and no copy.

    Args:
        x: this rank's part, as :func:`shard` gives it: ``(B, T_r, S, ...)`` or ``(B, T, S_r, ...)``.
        mesh: a ``DeviceMesh`` of one dimension.
        sizes: ``(T, S)`` of the whole.
        source, target: ``"frames"`` or ``"tokens"``: which is split before and after.

    Returns:
        ``(B, T, S_r, ...)`` or ``(B, T_r, S, ...)``, contiguous.

    Raises:
        ValueError, TypeError: x is not this rank's part of the sizes; another mesh or name.
        ExchangeError: a rank has ended, came with another shape, or not within the group's timeout.
    """
    move = _checked("switch", x, mesh, sizes, source, target)
    return x if source == target else moved(x, move)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.peers, ctx.dim, ctx.sizes, ctx.shape = peers, dim, sizes, tuple(x.shape)
        whole = [*x.shape]
        whole[dim] = sum(sizes)
        counts = counts_along(x.shape, dim, sizes)
        most = max(counts)
        flat = x.contiguous().view(-1)
        if flat.numel() < most:
            flat = torch.cat((flat, flat.new_zeros(most - flat.numel())))
        gathered = all_gather(flat, peers)
        if min(counts) < most:
            gathered = torch.cat([part[:n] for part, n in zip(gathered.view(peers.ranks, most), counts)])
        return unpack(gathered, whole, dim, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        peers, n = ctx.peers, torch.Size(ctx.shape).numel()
        (dy,) = grads
        sent = counts_along(dy.shape, ctx.dim, ctx.sizes)
        flat = wait(start_exchange(pack(dy, ctx.dim, ctx.sizes), sent, [n] * peers.ranks, peers), peers)
        return sum_of(flat.view(peers.ranks, n)).to(dy.dtype).view(ctx.shape), None, None, None


def sum_of(parts: Tensor) -> Tensor:
    """``(N, n)`` to ``(n,)``, in float32 at least, in the order of ranks."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part
    return total


def gather_along(x: Tensor, peers: Peers, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """The whole along a dimension on every rank; ``sizes``: of that dimension, by rank."""
    if peers.ranks == 1:
        return x
    refuse_transforms("gather", x)
    return _Gather.apply(x, peers, dim, sizes)


def gather(x: Tensor, mesh: DeviceMesh, sizes: tuple[int, int], dim: Dim = "frames") -> Tensor:
    """The whole on every rank. Backward sums the ranks' gradients of the whole, in float32 and in their order.

    Args:
        x: this rank's part, ``(B, T_r, S, ...)`` or ``(B, T, S_r, ...)``.
        mesh: a ``DeviceMesh`` of one dimension.
        sizes: ``(T, S)`` of the whole.
        dim: what is split.

    Returns:
        ``(B, T, S, ...)``.

    Raises:
        ValueError, TypeError, ExchangeError: as :func:`switch`.
    """
    op = "gather"
    peers, sizes, axis = peers_of(op, mesh), check_sizes(op, sizes), check_dim(op, "dim", dim)
    check_part(op, check_tensor(op, "x", x), peers, sizes, dim)
    return gather_along(x, peers, axis, part_sizes(sizes[axis - 1], peers.ranks))
