"""What gradients of parameters are under context parallelism, and their mean over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcore.parallel.messages import all_reduce, refuse_transforms
from vdcore.parallel.peers import Peers, part_sizes, peers_of
from vdcore.parallel.switch import gather_along

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BUCKET = 2**24  # elements that are summed over ranks at once: 64 MiB of float32


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by the factor.

    A model multiplies its output's gradient by N and divides those of its inputs by N: its parameters' gradients are N
    times the rank's share then, whatever holds them (FSDP2 replaces parameters, so hooks of theirs would be lost).
    """
    if factor == 1 or not torch.is_grad_enabled() or not x.requires_grad:
        return x
    refuse_transforms("scale_gradient", x)
    return _Scale.apply(x, factor)


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.peers, ctx.dim, ctx.sizes = peers, dim, sizes
        return x.split(list(sizes), dim)[peers.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        whole = gather_along(grads[0] / ctx.peers.ranks, ctx.peers, ctx.dim, ctx.sizes)
        return whole, None, None, None


def own_part(x: Tensor, peers: Peers, dim: int, each: int = 1) -> Tensor:
    """This rank's part of what every rank holds whole and has to have the whole gradient of, for a model whose
    gradients are N times the rank's share.

    Args:
        dim: of frames, or of ``each`` steps per frame.
    """
    if peers.ranks == 1:
        return x
    sizes = tuple(n * each for n in part_sizes(x.shape[dim] // each, peers.ranks))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.split(list(sizes), dim)[peers.rank]
    refuse_transforms("shard", x)
    return _OwnPart.apply(x, peers, dim, sizes)


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        return (all_reduce(wide.contiguous(), ctx.peers) / ctx.peers.ranks).to(dy.dtype), None


def everywhere(x: Tensor, peers: Peers) -> Tensor:
    """As :func:`own_part`, of what has no frames and is the same on every rank."""
    if peers.ranks == 1 or not torch.is_grad_enabled() or not x.requires_grad:
        return x
    refuse_transforms("everywhere", x)
    return _Everywhere.apply(x, peers)


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """The mean over the mesh of every parameter's gradient, in place: the gradient of one process.

    For models without DDP or FSDP2, which take that mean themselves. Sums are taken in float32 at least, the same bits
    on every rank. A gradient that is None on some ranks counts as 0 there; one that is None on all stays None.

    Raises:
        ValueError, TypeError: if the mesh is none of one dimension.
        ExchangeError: as :func:`switch`.
    """
    peers = peers_of("average_gradients", mesh)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if peers.ranks == 1 or not parameters:
        return
    device = parameters[0].device
    here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    somewhere = all_reduce(here, peers).tolist()
    for p, ranks in zip(parameters, somewhere):
        if ranks and p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets(grads):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([grad.reshape(-1).to(wide) for grad in bucket])
        flat = all_reduce(flat, peers).div_(peers.ranks)
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket])):
            grad.copy_(mean.view(grad.shape))


@torch.no_grad()
def total(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over ranks of what each has, of a loss, say; no gradient."""
    peers = peers_of("total", mesh)
    return x if peers.ranks == 1 else all_reduce(x, peers)


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device, up to :data:`BUCKET` elements together."""
    bucket: list[Tensor] = []
    for grad in grads:
        full = sum(x.numel() for x in bucket) + grad.numel() > BUCKET
        if bucket and (full or (grad.dtype, grad.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
