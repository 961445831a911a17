"""Several processes on one machine, over gloo: for tests, profiles, and trying things out without a GPU."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class WorldError(RuntimeError):
    """A process of the world failed, was killed, or all took too long; the message says which and how."""


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 300.0) -> list[Any]:
    """Calls ``function(mesh, *arguments)`` in as many processes, one thread each; returns their results by rank.

    Args:
        function: importable, as are its arguments picklable; ``mesh`` is a ``DeviceMesh`` of one dimension, on gloo.
        ranks: N.
        timeout: seconds for all; processes that are left then are killed. An exchange fails after a third of it, or
            60 s.

    Raises:
        WorldError: if a process fails; the others are ended.
    """
    context = mp.get_context("spawn")
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="vdcore-ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        store = os.path.join(folder, "store")
        processes = [
            context.Process(
                target=_rank, args=(pipes[rank][1], store, rank, ranks, min(timeout / 3, 60.0), function, arguments)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.daemon = True
            process.start()
        for _, theirs in pipes:
            theirs.close()
        try:
            return _collect([ours for ours, _ in pipes], processes, until, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], until: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting: dict[Any, int] = dict(zip(pipes, range(len(pipes))))
    while waiting:
        ready: list[Any] = wait(list(waiting), max(until - time.monotonic(), 0))
        if not ready:
            raise WorldError(f"ranks {sorted(waiting.values())} took longer than {timeout:.0f} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                results[rank], error = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                raise WorldError(f"rank {rank} ended with exit code {processes[rank].exitcode}") from None
            if error is not None:
                raise WorldError(f"rank {rank}: {error}")
    return [results[rank] for rank in sorted(results)]


def _rank(
    pipe: Connection,
    store: str,
    rank: int,
    ranks: int,
    patience: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=patience),
        )
        result = function(cpu_mesh(ranks), *arguments)
        pipe.send((result, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise
    with suppress(RuntimeError):
        dist.barrier()  # whoever leaves first ends what others still receive
        dist.destroy_process_group()


def cpu_mesh(ranks: int, name: str = "context") -> DeviceMesh:
    """The mesh of all processes of a world on gloo."""
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=(name,))
