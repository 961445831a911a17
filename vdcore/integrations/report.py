"""What a swap did, and which calls went to the host after all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vdcore.integrations.check import Check, compare, twice


class _Turn:
    """Whose code runs: the host's while :meth:`Report.check` asks for it, in the thread or task that checks."""

    def __init__(self) -> None:
        self._checks = 0  # that run now, anywhere
        self._lock = Lock()
        self._mine: ContextVar[bool] = ContextVar("vdcore.integrations.turn", default=False)

    @property
    def is_hosts(self) -> bool:
        if self._checks == 0:
            return False
        # A compiler knows no context variables: code that it made is the host's for everybody while anybody checks.
        return True if torch.compiler.is_compiling() else self._mine.get()

    @contextmanager
    def of_host(self) -> Iterator[None]:
        with self._lock:
            self._checks += 1
        token = self._mine.set(True)
        try:
            yield
        finally:
            self._mine.reset(token)
            with self._lock:
                self._checks -= 1


TURN = _Turn()

# The module whose forward runs with functions of vdcore in it, which do not get it.
running: ContextVar[nn.Module | None] = ContextVar("vdcore.integrations.running", default=None)

# Why calls of a served module, processor or function went to the host after all.
_left_at_run_time: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def note_left(who: Any, reason: str) -> None:
    """Remembers why a call was left to the host, for the report."""
    if not torch.compiler.is_compiling() and not TURN.is_hosts:
        _left_at_run_time.setdefault(who, set()).add(reason)


def note_left_by_running(reason: str) -> None:
    """As :func:`note_left`, of the module that calls a function of vdcore."""
    who = None if torch.compiler.is_compiling() else running.get()
    if who is not None:
        note_left(who, reason)


@dataclass(frozen=True)
class Entry:
    """One module of the host.

    Args:
        name: its path in the model; the model itself is named after its class.
        kind: its class in the host.
        what: the operators that serve it, or the reason why it was left.
    """

    name: str
    kind: str
    what: str


@dataclass
class Report:
    """Which modules run vdcore now, and which were left to the host and why.

    ``left`` also names served modules some of whose calls had to be left since, with the reason. ``notes`` say what
    else makes the model slow here. ``print(report)`` sums up by class.
    """

    served: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Makes what :meth:`dense` is, where a host's models have masks.
    dense_inside: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)
    _left: list[Entry] = field(default_factory=list)
    _serving: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    @property
    def left(self) -> list[Entry]:
        return [*self._left, *self.left_at_run_time()]

    def left_at_run_time(self) -> list[Entry]:
        """Calls of served modules that went to the host after all."""
        found = []
        for entry in self.served:
            reasons = {reason for who in self._serving[entry.name] for reason in _left_at_run_time.get(who, ())}
            found += [Entry(entry.name, entry.kind, reason) for reason in sorted(reasons)]
        return found

    def add_served(self, name: str, kind: str, what: str, *serving: Any) -> None:
        """
        Args:
            serving: the objects that note calls they leave; known by them also after a swap out.
        """
        self.served.append(Entry(name, kind, what))
        self._serving[name] = list(serving)

    def add_left(self, name: str, kind: str, reason: str) -> None:
        self._left.append(Entry(name, kind, reason))

    def dense(self) -> AbstractContextManager[None]:
        """A block in which all layers see everything, whatever their mask, in this thread's calls.

        Code that is compiled already runs dense in other threads too while one is inside.
        """
        return self.dense_inside()

    def check(self, model: Any, *args: Any, **inputs: Any) -> Check:
        """Calls a swapped model, or pipeline, as its host and as it is, and prints how far apart the results are.

        Each is called twice without gradients, from the same state of torch's random numbers; the second call's time
        counts. Under a mask the results differ, as they should. Other threads' calls go on as they are, but for those
        of compiled models, which are the host's meanwhile. Of a pipeline's video also what a viewer would see of it,
        and ``report.check(pipeline, ...).show("same.png")`` draws it.
        """
        if isinstance(model, nn.Module) and not any(hasattr(type(x), "SERVES") for x in _parts(model)):
            raise ValueError("check: model must be swapped in, got one of which nothing is")
        with TURN.of_host():
            host = twice(model, args, inputs)
        found = compare(host, twice(model, args, inputs))
        print(found)
        return found

    def __str__(self) -> str:
        lines = []
        for title, entries in (("served", self.served), ("left", self.left)):
            groups = Counter((entry.kind, entry.what) for entry in entries)
            lines.append(f"{title}: {len(entries)}")
            lines += [f"  {count} x {kind}: {what}" for (kind, what), count in groups.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


# ---- Dtypes ----

SLOW = 4.0  # CPUs without instructions for a dtype are tens of times slower, those with them at most as slow


@lru_cache
def slow_dtype(dtype: torch.dtype) -> str | None:
    """A note if this CPU multiplies matrices of a dtype much more slowly than in float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    pairs = [torch.ones(256, 256, dtype=kind) for kind in (torch.float32, dtype)]
    least = [math.inf, math.inf]
    with torch.no_grad():
        for _ in range(6):  # by turns, as others may use the processors
            for i, a in enumerate(pairs):
                start = perf_counter()
                a @ a
                least[i] = min(least[i], perf_counter() - start)
    ratio, name = least[1] / least[0], str(dtype).removeprefix("torch.")
    if ratio < SLOW:
        return None
    return f"a product of matrices takes {ratio:.0f} times as long in {name} as in float32 on this CPU: use float32"


def _parts(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (module, getattr(module, "processor", None))
