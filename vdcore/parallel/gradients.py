"""What gradients of parameters are under context parallelism, and their mean over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcore.parallel.messages import all_reduce
from vdcore.parallel.peers import peers_of

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
    return _Scale.apply(x, factor)


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
