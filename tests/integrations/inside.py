"""What happens inside a call of a model: the attention that it computes, and where its time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

import vdcore


class AttentionCalls:
    """Counts the attention that is computed inside: torch's, by the length of queries and keys, and vdcore's.

    It stands in torch's place, and is no function mode: under one, calls are left to the host.
    """

    def __init__(self) -> None:
        self.torch: Counter[tuple[int, int]] = Counter()
        self._before = vdcore.calls()

    def __enter__(self) -> AttentionCalls:
        self._attention = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._counted
        return self

    def __exit__(self, *error: Any) -> None:
        F.scaled_dot_product_attention = self._attention

    def _counted(self, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        self.torch[query.shape[-2], key.shape[-2]] += 1
        return self._attention(query, key, *args, **kwargs)

    @property
    def served(self) -> int:
        """Calls of vdcore's attention operators since."""
        return sum(self.operators().values())

    def operators(self) -> Counter[str]:
        """The same by operator."""
        found: Counter[str] = Counter()
        for (op, _, direction), n in (vdcore.calls() - self._before).items():
            if op.endswith("attention") and direction == "fwd":
                found[op] += n
        return found


# Operators by what they are for; the first pattern that is part of an operator's name counts.
ACTIVATIONS = "activations"
_PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::convolution")
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention", "softmax")),
    ("matrix products", ("addmm", "::mm", "bmm", "baddbmm", "convolution", "linear", "matmul")),
    (ACTIVATIONS, ("gelu", "silu", "sigmoid", "tanh")),
    ("norms and modulation", ("norm", "modulate", "gate_residual", "rope", "var_mean", "rsqrt")),
    ("copies and permutes", ("copy", "clone", "contiguous", "cat", "stack", "repeat", "pad")),
)


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one call by group of operators; ``around`` is what lies around the matrix products."""

    groups: dict[str, float]

    @property
    def around(self) -> float:
        """Attention, permutes, norms, modulation, residuals: all but matrix products and activations."""
        return sum(ms for name, ms in self.groups.items() if name not in ("matrix products", ACTIVATIONS))

    @property
    def total(self) -> float:
        return sum(self.groups.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(self.groups.items(), key=lambda x: -x[1]))


def breakdown(call: Callable[[], Any], *, rounds: int = 5) -> Breakdown:
    """Where the time of a call goes on the CPU, by torch's profiler: of the rounds, the one with the least in all.

    What an operator calls inside of itself counts as the operator: adding a bias belongs to the product. A product of
    the shape of an activation's result is the gate of a gated activation, and belongs to it.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    found: list[Breakdown] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            call()
        events = profiler.events() or []
        activated = {str(e.input_shapes[0]) for e in events if _group(e.name) == ACTIVATIONS and e.input_shapes}
        groups = dict.fromkeys([*(name for name, _ in GROUPS), "element by element"], 0.0)
        for event in events:
            gates = event.name in ("aten::mul", "aten::mul_") and str(event.input_shapes[0]) in activated
            groups[ACTIVATIONS if gates else _group(_outermost(event))] += event.self_cpu_time_total / 1000
        found.append(Breakdown(groups))
    return min(found, key=lambda one: one.total)


def _outermost(event: Any) -> str:
    """The product that an event is part of, else its own name."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.rstrip("_") in _PRODUCTS:
            return parent.name
        parent = parent.cpu_parent
    return event.name


def _group(name: str) -> str:
    for group, patterns in GROUPS:
        if any(pattern in name for pattern in patterns):
            return group
    return "element by element"
