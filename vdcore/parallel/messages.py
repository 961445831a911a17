"""All that passes between ranks: one all-to-all, started and waited for, and one all-gather.

They are ``torch.distributed``'s functional collectives, which ``torch.compile`` sees as part of the graph. What is
started is a tensor that nobody may read before it is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import Tensor

from vdcore.modes import is_transformed
from vdcore.ops.choose import has_tangent
from vdcore.parallel.peers import Peers

# Ranks compare sizes before every exchange, which costs a small one and the host's time.
CHECKS = os.environ.get("VDCORE_CHECK", "0") not in ("", "0")


class ExchangeError(RuntimeError):
    """Ranks did not come together: one has ended, sends another shape, or is late for the group's timeout."""


def refuse_transforms(op: str, *tensors: Tensor) -> None:
    """Autograd's backward passes between ranks, nothing else does: never a tangent or a gradient that is silently 0.

    Raises:
        RuntimeError: if one of the tensors has a tangent, or a transform of ``torch.func`` is at work.
    """
    if torch.compiler.is_compiling() or not is_transformed():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(*tensors):
        raise RuntimeError(
            f"parallel.{op}: no tangents and no transforms of torch.func pass between ranks: take gradients by backward"
        )


@contextmanager
def _failing_clearly(what: str, peers: Peers) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ExchangeError(
            f"{what}: rank {peers.rank} of {peers.ranks} could not exchange with the others: one of them has ended, "
            f"came with another shape, or did not come within the group's timeout ({error})"
        ) from error


def start_exchange(flat: Tensor, sent: Sequence[int], received: Sequence[int], peers: Peers) -> Tensor:
    """Sends every rank its piece of a flat tensor; wait for the result with :func:`wait`.

    Args:
        flat: ``(sum(sent),)``, pieces by rank.
        sent, received: elements to and from each rank.

    Returns:
        ``(sum(received),)``, pieces by rank.
    """
    exchange = torch.ops._c10d_functional.all_to_all_single
    if torch.compiler.is_compiling():
        return exchange(flat, list(received), list(sent), peers.group)
    if CHECKS:
        _check_agreement(sent, received, flat, peers)
    with _failing_clearly("all_to_all", peers):
        return exchange(flat, list(received), list(sent), peers.group)


def _check_agreement(sent: Sequence[int], received: Sequence[int], flat: Tensor, peers: Peers) -> None:
    """Every rank sends what the other expects."""
    mine = torch.tensor([n * flat.element_size() for n in (*sent, *received)], device=flat.device)
    table = all_gather(mine, peers).view(peers.ranks, 2, peers.ranks).tolist()
    for i, (to, _) in enumerate(table):
        for j, (_, expected) in enumerate(table):
            if to[j] != expected[i]:
                raise ExchangeError(
                    f"all_to_all: rank {j} expects {expected[i]} bytes of rank {i}, which sends {to[j]}: their tensors "
                    "have other shapes or dtypes"
                )


def wait(started: Tensor, peers: Peers) -> Tensor:
    """What was started, arrived."""
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(started)
    with _failing_clearly("wait", peers):
        return torch.ops._c10d_functional.wait_tensor(started)


def all_gather(flat: Tensor, peers: Peers) -> Tensor:
    """``(n,)``, the same n on every rank, to ``(N * n,)``."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor
    if torch.compiler.is_compiling():
        return wait(gathered(flat, peers.ranks, peers.group), peers)
    with _failing_clearly("all_gather", peers):
        started = gathered(flat, peers.ranks, peers.group)
    return wait(started, peers)


def all_reduce(x: Tensor, peers: Peers) -> Tensor:
    """The sum over ranks."""
    refuse_transforms("total", x)
    with _failing_clearly("all_reduce", peers):
        started = torch.ops._c10d_functional.all_reduce(x, "sum", peers.group)
    return wait(started, peers)


# ---- Pieces of a tensor along one dimension ----


def flattened(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pieces one after another, flat; each is copied once."""
    flat = torch.empty(sum(piece.numel() for piece in pieces), dtype=like.dtype, device=like.device)
    spread(flat, pieces, lambda piece, part: part.copy_(piece))
    return flat


def spread(flat: Tensor, pieces: Sequence[Tensor], into: Callable[[Tensor, Tensor], Any]) -> None:
    """Calls ``into`` with every piece and the part of a flat tensor that stands for it, in its shape."""
    first = 0
    for piece in pieces:
        into(piece, flat[first : first + piece.numel()].view(piece.shape))
        first += piece.numel()


def pack(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Pieces of x along a dimension, one after another, flat: x itself where they lie so already, else one copy."""
    if x.is_contiguous() and (x.shape[:dim].numel() == 1 or x.numel() == 0):
        return x.reshape(-1)
    return flattened(x.split(list(sizes), dim), x)


def unpack(flat: Tensor, shape: Sequence[int], dim: int, sizes: Sequence[int]) -> Tensor:
    """A tensor of its pieces along a dimension: a view where they lie so already, else one copy."""
    shape = torch.Size(shape)
    if shape[:dim].numel() == 1 or shape.numel() == 0:
        return flat.view(shape)
    x = torch.empty(shape, dtype=flat.dtype, device=flat.device)
    spread(flat, x.split(list(sizes), dim), torch.Tensor.copy_)
    return x


def counts_along(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> list[int]:
    """Elements of the pieces of a tensor along a dimension."""
    other = torch.Size([*shape[:dim], *shape[dim + 1 :]]).numel()
    return [n * other for n in sizes]
