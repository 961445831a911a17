"""Tangents of a case's results, judged by the tolerance rule against difference quotients in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.testing.cases import TORCH_FORMS, Case, Inputs
from vdcore.testing.run import flatten
from vdcore.testing.tolerance import Errors, Ratio, errors, pooled, ratio

STEP = 1e-6  # of the quotients: central, in float64


def of_leaves(inputs: Inputs, function: Callable[..., Any], **kwargs: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The function's results, in order, as a function of the leaves."""

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        instead = {id(x): y for x, y in zip(inputs.leaves.values(), leaves)}
        return tuple(flatten(function(**_replaced(inputs.args, instead), **kwargs)))

    return call


def _replaced(x: Any, instead: dict[int, Tensor]) -> Any:
    """The same with other tensors in it."""
    if isinstance(x, Tensor):
        return instead.get(id(x), x)
    if isinstance(x, dict):
        return {key: _replaced(value, instead) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_replaced(y, instead) for y in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        given = (field.name for field in dataclasses.fields(x) if field.init)
        return dataclasses.replace(x, **{name: _replaced(getattr(x, name), instead) for name in given})
    return x


def directions(inputs: Inputs, seed: int = 0) -> list[Tensor]:
    """A tangent for every leaf, of numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(2000 + seed)
    found = []
    for x in inputs.leaves.values():
        dx = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
        found.append(dx.to(x.device, x.dtype))
    return found


def quotients(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """``(f(x + h dx) - f(x - h dx)) / 2h`` of the reference, in float64; 0 where the results are infinite."""
    inputs = case.inputs(dtype, stored=torch.float64, seed=seed)
    f = of_leaves(inputs, getattr(vdcore, case.op), backend="reference")
    pairs = list(zip(inputs.leaves.values(), directions(inputs, seed)))
    above, below = (f(*(x + h * dx for x, dx in pairs)) for h in (STEP, -STEP))
    return [torch.where(a.isfinite(), (a - b) / (2 * STEP), 0.0) for a, b in zip(above, below)]


def pushed(inputs: Inputs, function: Callable[..., Any], tangents: Sequence[Tensor], **kwargs: Any) -> list[Tensor]:
    """The results' tangents, by torch.func.jvp."""
    f = of_leaves(inputs, function, **kwargs)
    return list(torch.func.jvp(f, tuple(inputs.leaves.values()), tuple(tangents))[1])


def judge_tangents(
    case: Case, backend: str | None, dtype: torch.dtype = torch.float32, *, layout: str = "contiguous", seeds: int = 4
) -> dict[str, Ratio]:
    """Error ratios of a backend's tangents by result, held to three times the error of PyTorch's forms."""
    ours: dict[str, list[Errors]] = {}
    theirs: dict[str, list[Errors]] = {}
    dtypes = {}
    for seed in range(seeds):
        exact = quotients(case, dtype, seed)
        inputs = case.inputs(dtype, seed=seed, layout=layout)
        found = pushed(inputs, getattr(vdcore, case.op), directions(inputs, seed), backend=backend)
        plain = case.inputs(dtype, seed=seed)
        form = next(iter(TORCH_FORMS[case.op].values()))  # the first is naive; torch's fused attention has no tangents
        by_torch = pushed(plain, form, directions(plain, seed))
        for i, (x, y, z) in enumerate(zip(found, by_torch, exact, strict=True)):
            ours.setdefault(f"output {i}", []).append(errors(x, z))
            theirs.setdefault(f"output {i}", []).append(errors(y, z))
            dtypes[f"output {i}"] = x.dtype
    return {name: ratio(pooled(ours[name]), [pooled(theirs[name])], dtypes[name], gradient=True) for name in ours}
