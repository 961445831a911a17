"""The suites of ``vdcore bench SUITE``, a module each.

Its ``TAKES`` names the options that it reads, ``run(options, journal, watch)`` measures, and ``why_not(options)`` gives
the reason why it cannot run here, if it may not be able to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from vdcore_bench.measure import machine
from vdcore_bench.measure.timing import ROUNDS
from vdcore_bench.peers.registry import Peer
from vdcore_bench.workloads import Budget

# Name -> what it measures. A new one is a module here and a line.
SUITES = {
    "operators": "every operator against its baselines",
    "masks": "time per visible pair of masks over frames, and of windows on a grid",
    "memory": "peak memory and time against frames",
    "models": "a video DiT's block, VDiTs against frames, blocks and steps of diffusers before and after the swap",
    "overhead": "the time of a call beside its kernel",
    "tangents": "Jacobian-vector products of attention against forward",
    "gradients": "errors of gradients in half precision against the number of tokens",
    "gpu": "correctness, ceilings and benchmarks of a GPU",
}


@dataclass(frozen=True)
class Options:
    """What the command line says; empty or None: nothing is named.

    Args:
        peers: names of baselines; ``own``: baselines of the user's own, which run beside them.
        memory_limit: bytes that a provider may need.
        until: of time.monotonic(); nothing new begins after it.
    """

    ops: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    peers: frozenset[str] = frozenset()
    own: tuple[Peer, ...] = ()
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    norm_rope: bool = False
    batch: int = 1
    seconds: float = 2.0
    rounds: int = ROUNDS
    memory_limit: int | None = None
    full_size: bool = False
    device: str = "cpu"
    until: float = math.inf

    def named(self) -> set[str]:
        """The fields that are not as they would be by themselves; the device is always there."""
        return {f.name for f in fields(self) if getattr(self, f.name) != f.default} - {"device"}

    @property
    def choose(self) -> bool:
        """They say what is measured, and not only how."""
        return bool(self.named() - {"seconds", "rounds", "memory_limit", "full_size", "until"})

    @cached_property
    def limit(self) -> int:
        """Bytes that a provider may need: as named, or what the machine has."""
        return machine.memory_limit(self.device) if self.memory_limit is None else self.memory_limit

    @cached_property
    def budget(self) -> Budget:
        """What one call may cost."""
        if self.full_size:
            return Budget.unlimited()
        return Budget.of(self.device, torch.get_num_threads(), machine.memory_limit(self.device))


def no_gpu(options: Options) -> str | None:
    """Why a suite that runs on a GPU, if that is what is wanted, cannot."""
    wanted = options.device.startswith("cuda") and not torch.cuda.is_available()
    return f"{options.device}: no GPU is visible to torch" if wanted else None


def find(name: str) -> Any:
    """The module of one of :data:`SUITES`."""
    return import_module(f"{__name__}.{name}")
