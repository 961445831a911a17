"""Every argument's documented alternatives, and cases of all pairs of them.

An argument whose alternatives are tried one at a time, or in matched pairs, hides what two of them do together.
:func:`pairwise` covers every pair of alternatives with few cases, and random calls draw from the same declaration, to
which dtypes, layouts and distributions of values are added here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch

from vdcore.ops.alternatives import SPACES as DECLARED
from vdcore.ops.alternatives import Choice, Sizes, Space
from vdcore.testing.cases import DISTRIBUTIONS, Case
from vdcore.testing.layouts import LAYOUTS

__all__ = ["SPACES", "Choice", "Sizes", "Space", "case_of", "pairwise"]

COMMON: dict[str, tuple[Any, ...]] = {
    "values": tuple(DISTRIBUTIONS),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "layout": tuple(LAYOUTS),
}
SPACES = {op: Space({**space.alternatives, **COMMON}, space.build, space.allows) for op, space in DECLARED.items()}


def case_of(op: str, choice: Choice, sizes: Sizes) -> Case:
    """A case; its dtype and layout are the choice's ``dtype`` and ``layout``, which a test passes on."""
    names = [f"{name}={_named(value)}" for name, value in choice.items()]
    name = f"{', '.join(names)}, {sizes}"
    return Case(op, name, lambda d: SPACES[op].build(d, choice, sizes), values=choice["values"])


def _named(value: Any) -> str:
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


def pairwise(space: Space, seed: int = 0) -> Iterator[tuple[Choice, Sizes]]:
    """Choices and sizes that hold every allowed pair of alternatives of two arguments, greedily few."""
    rng = random.Random(seed)
    names = list(space.alternatives)
    left = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(space.alternatives[a]))
        for j in range(len(space.alternatives[b]))
    }

    def pairs(indices: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
        return {frozenset(pair) for pair in itertools.combinations(indices.items(), 2)}

    def choice_of(indices: dict[str, int]) -> Choice:
        return {name: space.alternatives[name][indices[name]] for name in names}

    def completed(fixed: dict[str, int]) -> dict[str, int]:
        return {name: fixed.get(name, rng.randrange(len(space.alternatives[name]))) for name in names}

    while left:
        first = min(left, key=lambda pair: sorted(pair))
        trials = [t for t in (completed(dict(first)) for _ in range(60)) if space.allows(choice_of(t))]
        if not trials:  # the operator refuses this pair
            left.discard(first)
            continue
        best = max(trials, key=lambda t: len(pairs(t) & left))
        left -= pairs(best)
        yield choice_of(best), Sizes.drawn(rng)
