"""Counts what a process sends and what it holds: by the messages and tensors that torch makes, not by formulas."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _ranks_of(group: Any) -> int:
    """Of a process group, or of one by its name."""
    named: Any = torch.distributed.distributed_c10d._resolve_process_group
    return (named(group) if isinstance(group, str) else group).size()


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as torch's own modes: else the first operator imports the compiler, for seconds


class Traffic(_Mode):
    """Inside, adds up the bytes that this rank sends to others by functional collectives.

    An all-to-all sends what is not for this rank; an all-gather its part to every other; a reduction, after the
    bandwidth-optimal algorithm (Patarasuk and Yuan 2009), ``1 - 1/N`` of the whole to reduce and as much to spread.

    Args:
        rank: of this process in the groups that are used.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sent: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional":
            name = func.name().partition("::")[2].partition(".")[0]
            self._count(name, *args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, *args: Any) -> None:
        x: Tensor = args[0]
        if name == "all_to_all_single":
            elements = sum(n for rank, n in enumerate(args[2]) if rank != self.rank)
            row = x[:1].numel() if len(x) else 0
            sent = elements * row * x.element_size()
        elif name == "all_gather_into_tensor":
            sent = x.nbytes * (args[1] - 1)
        elif name == "reduce_scatter_tensor":
            sent = x.nbytes * (args[2] - 1) // args[2]
        elif name == "all_reduce":
            ranks = _ranks_of(args[2])
            sent = 2 * x.nbytes * (ranks - 1) // ranks
        elif name in ("wait_tensor", "_wrap_tensor_autograd"):  # send nothing
            return
        else:
            raise NotImplementedError(f"Traffic: {name} is not counted yet")
        self.sent[name] += sent
        self.messages[name] += 1


class Allocations(_Mode):
    """Inside, counts the bytes of storages that operators return and somebody still holds; :attr:`peak` is the most.

    What an operator takes inside of itself is not seen, nor what was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self._hold(x.untyped_storage())
        return result

    def _hold(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
