"""Whether ranks come with tensors that fit together: one small exchange for a call of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdcore.parallel.messages import ExchangeError, all_gather
from vdcore.parallel.peers import Peers

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
DIMS = 6  # of a tensor that are told
Told = tuple[int, ...]  # of one tensor: 0 or 1, dtype, number of dimensions, sizes


def _told(x: Tensor | None) -> Told:
    if x is None:
        return (0,) * (3 + DIMS)
    sizes = [*x.shape[:DIMS], *[0] * (DIMS - x.ndim)]
    return 1, DTYPES.index(x.dtype), x.ndim, *sizes


def _said(told: Told) -> str:
    here, dtype, ndim, *sizes = told
    return f"{str(DTYPES[dtype]).removeprefix('torch.')} {tuple(sizes[:ndim])}" if here else "None"


def _digest(setting: Any) -> int:
    """Of what it is written as, which is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(setting).encode()).digest()[:7], "big")


def agreed(
    op: str,
    tensors: Mapping[str, Tensor | None],
    free: Mapping[str, int],
    peers: Peers,
    device: torch.device,
    model: nn.Module,
    settings: Mapping[str, Any],
) -> dict[str, tuple[int, ...]]:
    """Ranks tell one another the dtypes and shapes of their tensors, for which the host waits.

    Args:
        tensors: by name, the same names on every rank, of up to six dimensions.
        free: by name, the dimension in which ranks may differ.
        model: whose parameters may learn.
        settings: by name, what else must be the same on every rank; equal ones have equal representations.

    Returns:
        By these names, the size of that dimension on every rank.

    Raises:
        ExchangeError: on every rank, if any two differ; it says in what. Also as all exchanges.
    """
    # Backward is an exchange as well: every rank runs it, or none.
    learned = (x for x in (*tensors.values(), *model.parameters()) if x is not None)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    mine = [int(recorded), *map(_digest, settings.values()), *(n for x in tensors.values() for n in _told(x))]
    table = all_gather(torch.tensor(mine, device=device), peers).view(peers.ranks, -1).tolist()
    without = [rank for rank, row in enumerate(table) if not row[0]]
    if 0 < len(without) < peers.ranks:
        raise ExchangeError(f"{op}: gradients are recorded by all ranks but {without}")
    for i, (name, setting) in enumerate(settings.items(), start=1):
        others = [rank for rank, row in enumerate(table) if row[i] != table[0][i]]
        if others:
            raise ExchangeError(
                f"{op}: {name} must be the same on all ranks, got another one on {others} than on rank 0; on rank "
                f"{peers.rank} it is {setting!r}"
            )
    sizes = {}
    for i, name in enumerate(tensors):
        begin = 1 + len(settings) + i * (3 + DIMS)
        column = [tuple(row[begin : begin + 3 + DIMS]) for row in table]
        axis = free.get(name)
        if axis is not None:
            sizes[name] = tuple(told[3 + axis] for told in column)
        _compare(op, name, column, axis)
    return sizes


def _compare(op: str, name: str, column: Sequence[Told], axis: int | None) -> None:
    def fixed(told: Told) -> Told:
        return told if axis is None else (*told[: 3 + axis], *told[4 + axis :])

    for rank, told in enumerate(column):
        if fixed(told) != fixed(column[0]):
            raise ExchangeError(
                f"{op}: {name} must be the same on all ranks but for its frames, got {_said(column[0])} on rank 0 and "
                f"{_said(told)} on rank {rank}"
            )
