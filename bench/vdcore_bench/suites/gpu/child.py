"""Inside of a part's process: the card it runs on, its steps with a watchdog, and how it is left."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vdcore_bench.measure.journal import Journal, Row, row_here
from vdcore_bench.workloads import Budget

HUNG, LOST = 101, 102  # how a process is left whose step hangs, or whose GPU takes no more calls
DRY = "stub"  # device of a dry run's rows: nothing of them was computed or measured

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What a part's process is told.

    Args:
        first: number of its first step; those before it are done.
        until: of time.monotonic(); no step begins after it.
        dry: on the stub of the driver: launches without results.
    """

    part: str
    out: Path
    shard: int = 0
    shards: int = 1
    first: int = 0
    until: float = math.inf
    patience: float = 90.0
    arch: str = "sm_90"
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def memory(self) -> int:
        """Bytes that are free."""
        return 2**28 if self.dry else int(torch.cuda.mem_get_info()[0])

    @property
    def budget(self) -> Budget:
        """What one call may cost."""
        return Budget(2e8, 2**22) if self.dry else Budget(math.inf, self.memory / 6)

    @property
    def seconds(self) -> float:
        """For the rounds of one job."""
        return 0.02 if self.dry else 0.5

    def file(self, suffix: str) -> Path:
        return self.out / f"{self.part}-{self.shard}-{self.first}.{suffix}"

    def row(self, dtype: torch.dtype = torch.bfloat16, **values: Any) -> Row:
        return row_here("cuda", dtype, **{"workload": "", "provider": "", "mode": "fwd+bwd", **values})


class Steps:
    """Walks through a part's steps: notes which one is under way, and leaves the process where one hangs or kills it.

    Who started the process reads the note, and starts another one behind the step.
    """

    def __init__(self, given: Given, journal: Journal) -> None:
        self.given, self.journal = given, journal
        self.begun = self.number = 0

    def __call__(self, items: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        g = self.given
        for item in items:
            number, self.number = self.number, self.number + 1
            if number % g.shards != g.shard or number < g.first:
                continue
            if time.monotonic() > g.until:
                left = len(items) - number
                reason = f"the time of the part was over: {name(item)} and what follows, {left} steps"
                self.journal.add([g.row(op=g.part, provider="all", mode="fwd", status="skipped", reason=reason)])
                return
            self._note(number, name(item))
            dog = threading.Timer(g.patience, os._exit, (HUNG,))
            dog.daemon = True
            dog.start()
            yield item
            if lost(g):
                os._exit(LOST)
            dog.cancel()
            self._note(number + 1, "")

    def _note(self, number: int, name: str) -> None:
        self.given.file("at").write_text(json.dumps({"number": number, "name": name}))


def lost(given: Given) -> bool:
    """An illegal access ends the CUDA context: every later call of the process fails."""
    if given.dry:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def die_with_parent(parent: int) -> None:
    """Nobody reads what the child of a killed process measures, and it would hold the GPU.

    Args:
        parent: who started the process; a kill during its imports has left it another one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def dry_row(row: Row) -> Row:
    """Of a dry run: a device of its own, so that no table takes it for a measurement."""
    return replace(row, device=DRY)
