"""What people do with a model of diffusers besides calling it: a table for the test that swaps it in as well.

A situation changes a model, and says how it is called then: ``arrange(model, name)`` returns the call, whose tensors
are compared with the host's in the same situation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from host_runs import MODELS, output
from torch import Tensor

Call = Callable[[], list[Tensor]]
Arrange = Callable[[Any, str], Call]


@dataclass(frozen=True)
class Situation:
    """
    Args:
        arrange: as the module's docstring says.
        needs: packages, besides diffusers.
        out: the host's bits come back when the model is swapped out again.
        orders: when the situation comes: after the swap, or before.
        costly: it takes seconds: one family of every mechanism is enough.
    """

    arrange: Arrange
    needs: tuple[str, ...] = ()
    out: bool = True
    orders: tuple[str, ...] = ("after", "before")
    costly: bool = False


SITUATIONS: dict[str, Situation] = {}


def situation(name: str, *needs: str, **options: Any) -> Callable[[Arrange], Arrange]:
    def enter(arrange: Arrange) -> Arrange:
        SITUATIONS[name] = Situation(arrange, needs, **options)
        return arrange

    return enter


# ---- How a model is called ----


def plainly(model: Any, name: str, **others: Any) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [output(model(**MODELS[name].arguments(), **others))]

    return call


def in_steps(model: Any, name: str, count: int = 4) -> Call:
    """As a sampler does, with a video that changes a little from step to step."""

    def call() -> list[Tensor]:
        registry = getattr(model, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks()
        given, found = MODELS[name].arguments(), []
        key = "sample" if "sample" in given else "hidden_states"
        for step in range(count):
            context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
            with torch.no_grad(), context:
                found.append(output(model(**{**given, key: given[key] * (1 - 0.05 * step)})))
        return found

    return call


def blocks_of(model: Any) -> str:
    """The path of a list of blocks that has spatial attention."""
    if hasattr(model, "mid_block"):
        found = (n for n, m in model.named_modules() if n.endswith("transformer_blocks") and "motion" not in n)
        return next(found)
    return "auto"
