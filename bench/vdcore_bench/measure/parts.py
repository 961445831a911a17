"""Where the time of a call goes on the CPU, by torch's profiler: attention, products, norms, copies, the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

ATTENTION, PRODUCTS, CONVOLUTIONS, ACTIVATIONS = "attention", "matrix products", "convolutions", "activations"
NORMS, COPIES, ELEMENTS, REST = "norms and modulation", "copies and permutes", "element by element", "the rest"

# Parts of a call by what operators are for; the first pattern that is part of an operator's name counts.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (ATTENTION, ("attention", "softmax")),
    (CONVOLUTIONS, ("conv",)),
    (PRODUCTS, ("addmm", "::mm", "bmm", "baddbmm", "linear", "matmul", "patchify")),
    (ACTIVATIONS, ("gelu", "silu", "sigmoid", "tanh")),
    (NORMS, ("norm", "modulate", "gate_residual", "rope", "var_mean", "rsqrt")),
    (COPIES, ("copy", "clone", "contiguous", "cat", "stack", "repeat", "pad")),
)
PARTS = (*(name for name, _ in GROUPS), ELEMENTS, REST)
# What an operator calls inside of itself counts as the operator, for these.
_WHOLE = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::convolution")
_CALL = "vdcore_bench: the call"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one call by part; ``around`` is what lies around the products. The parts add up to the call."""

    groups: dict[str, float]

    @property
    def around(self) -> float:
        """Attention, permutes, norms, modulation, residuals: all but products, convolutions and activations."""
        return sum(ms for name, ms in self.groups.items() if name not in (PRODUCTS, CONVOLUTIONS, ACTIVATIONS))

    @property
    def total(self) -> float:
        return sum(self.groups.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(self.groups.items(), key=lambda x: -x[1]))


def breakdown(call: Callable[[], Any], *, rounds: int = 5, warm: bool = False) -> Breakdown:
    """Where the time of a call goes: of the rounds, the one with the least in all.

    What an operator calls inside of itself counts as the operator: adding a bias belongs to the product, and products
    inside of an attention to it. A product of the shape of an activation's result is the gate of a gated activation,
    and belongs to it. The rest is between operators: Python.

    Args:
        warm: the call has been made before; else it is made once, not counted.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to the terminal whenever it begins and ends
    if not warm:
        call()
    found: list[Breakdown] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function(_CALL):
            call()
        events = profiler.events() or []
        activated = {str(e.input_shapes[0]) for e in events if _group(e.name) == ACTIVATIONS and e.input_shapes}
        groups = dict.fromkeys(PARTS, 0.0)
        for event in _inside(events):
            gates = event.name in ("aten::mul", "aten::mul_") and str(event.input_shapes[0]) in activated
            groups[ACTIVATIONS if gates else _group(_outermost(event))] += event.self_cpu_time_total / 1000
        found.append(Breakdown(groups))
    return min(found, key=lambda one: one.total)


def _inside(events: Any) -> list[Any]:
    """The call itself, whose own time is Python's, and the events in it."""
    (whole,) = (event for event in events if event.name == _CALL)
    found, ahead = [], [whole]
    while ahead:
        event = ahead.pop()
        found.append(event)
        ahead += event.cpu_children
    return found


def _outermost(event: Any) -> str:
    """The attention or product that an event is part of, else its own name."""
    name, parent = event.name, event.cpu_parent
    while parent is not None:
        if parent.name.rstrip("_") in _WHOLE or _group(parent.name) == ATTENTION:
            name = parent.name
        parent = parent.cpu_parent
    return str(name)


def _group(name: str) -> str:
    if name == _CALL:
        return REST
    for group, patterns in GROUPS:
        if any(pattern in name for pattern in patterns):
            return group
    return ELEMENTS
