"""What a swap did, and which calls went to the host after all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

# Why calls of a served module, processor or function went to the host after all.
_left_at_run_time: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def note_left(who: Any, reason: str) -> None:
    """Remembers why a call was left to the host, for the report."""
    if not torch.compiler.is_compiling():
        _left_at_run_time.setdefault(who, set()).add(reason)


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

    ``left`` also names served modules some of whose calls had to be left since, with the reason. ``print(report)`` sums
    up by class.
    """

    served: list[Entry] = field(default_factory=list)
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

    def __str__(self) -> str:
        lines = []
        for title, entries in (("served", self.served), ("left", self.left)):
            groups = Counter((entry.kind, entry.what) for entry in entries)
            lines.append(f"{title}: {len(entries)}")
            lines += [f"  {count} x {kind}: {what}" for (kind, what), count in groups.items()]
        return "\n".join(lines)
