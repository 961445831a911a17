"""The processes that share a video, and who holds which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from vdcore.ops.check import wrong

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Dim = Literal["frames", "tokens"]
DIMS: dict[str, int] = {"frames": 1, "tokens": 2}  # of (B, T, S, ...)


@dataclass(frozen=True)
class Peers:
    """The processes of a one-dimensional mesh.

    Args:
        group: name of their process group.
        rank: of this process among them, from 0.
        ranks: how many there are, N.
    """

    group: str
    rank: int
    ranks: int

    def size(self, n: int) -> int:
        """How many of n this rank holds."""
        return part_sizes(n, self.ranks)[self.rank]

    def start(self, n: int) -> int:
        """The first of n that this rank holds."""
        return part_starts(n, self.ranks)[self.rank]


def part_sizes(n: int, ranks: int) -> tuple[int, ...]:
    """Of n over N ranks the first ``n % N`` hold one more, as ``numpy.array_split`` has it; a rank may hold none."""
    each, more = divmod(n, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def part_starts(n: int, ranks: int) -> tuple[int, ...]:
    return starts_of(part_sizes(n, ranks))


def starts_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each of several parts begins, one after another."""
    return tuple(accumulate(sizes, initial=0))[:-1]


def peers_of(op: str, mesh: DeviceMesh | Peers) -> Peers:
    """The processes of a mesh; those that are known already as they are.

    Raises:
        TypeError: if it is no ``DeviceMesh``.
        ValueError: if it has several dimensions, or this process is not in it.
    """
    if isinstance(mesh, Peers):
        return mesh
    if not hasattr(mesh, "get_group") or not hasattr(mesh, "mesh_dim_names"):
        raise TypeError(f"{op}: mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        names: Any = mesh.mesh_dim_names or tuple(mesh.shape)
        wrong(op, "mesh", "of one dimension, such as mesh['context']", f"dimensions {tuple(names)}")
    if mesh.get_coordinate() is None:
        wrong(op, "mesh", "one that this process is in", str(mesh))
    group = mesh.get_group()
    return Peers(group.group_name, mesh.get_local_rank(), mesh.size())


def check_dim(op: str, name: str, dim: Any) -> int:
    if dim not in DIMS:
        wrong(op, name, "'frames' or 'tokens'", repr(dim))
    return DIMS[dim]


def check_sizes(op: str, sizes: Any) -> tuple[int, int]:
    """``(T, S)`` of the whole."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or any(n < 0 for n in sizes):
        wrong(op, "sizes", "(T, S) of the whole, at least 0", sizes)
    return sizes[0], sizes[1]
