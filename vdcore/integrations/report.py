"""What a swap did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vdcore.integrations.diffusers._swap import Processor, reasons_left


@dataclass(frozen=True)
class Entry:
    """One module of the host.

    Args:
        name: its path in the model.
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
            reasons = {reason for who in self._serving[entry.name] for reason in reasons_left(who)}
            found += [Entry(entry.name, entry.kind, reason) for reason in sorted(reasons)]
        return found

    def add_served(self, name: str, kind: str, what: str, module: nn.Module) -> None:
        self.served.append(Entry(name, kind, what))
        self._serving[name] = [module]

    def add_left(self, name: str, kind: str, reason: str) -> None:
        self._left.append(Entry(name, kind, reason))

    def note_processors(self) -> None:
        """Remembers the processors that serve now, by which their calls are known also after a swap out."""
        for serving in self._serving.values():
            serving += [x for x in (getattr(serving[0], "processor", None),) if isinstance(x, Processor)]

    def __str__(self) -> str:
        lines = []
        for title, entries in (("served", self.served), ("left", self.left)):
            groups: dict[tuple[str, str], int] = {}
            for entry in entries:
                groups[entry.kind, entry.what] = groups.get((entry.kind, entry.what), 0) + 1
            lines.append(f"{title}: {len(entries)}")
            lines += [f"  {count} x {kind}: {what}" for (kind, what), count in groups.items()]
        return "\n".join(lines)
