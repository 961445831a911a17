"""Running a case on a backend, and judging it by the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.testing.cases import Case, Inputs
from vdcore.testing.layouts import lay_out
from vdcore.testing.tolerance import Ratio, error_ratio
from vdcore.testing.torch_forms import TORCH_FORMS


@dataclass
class Outcome:
    """Results of one call: outputs in order, and gradients by leaf name (empty if none were asked for)."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def _flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in _flatten(part)]


def run(
    inputs: Inputs, function: Callable[..., Any], *, gradients: bool = True, layout: str = "contiguous", **kwargs: Any
) -> Outcome:
    """Calls the function; gradients are of a fixed random combination of its outputs, -inf left out.

    Args:
        layout: of the incoming gradients.
    """
    outputs = _flatten(function(**inputs.args, **kwargs))
    if not gradients:
        return Outcome([x.detach() for x in outputs], {})
    wanted = {name: x for name, x in inputs.leaves.items() if x.requires_grad}
    incoming = []
    for i, y in enumerate(outputs):
        generator = torch.Generator("cpu").manual_seed(1000 + i)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu")
        # Every precision of a case gets the same incoming gradient: one that the lowest can hold.
        dy = dy.to(torch.bfloat16).to(y.dtype).to(y.device)
        dy = torch.where(y.detach().isfinite(), dy, torch.zeros_like(dy))
        incoming.append(lay_out(dy, layout))
    found = torch.autograd.grad(outputs, list(wanted.values()), incoming, allow_unused=True)
    grads = {name: torch.zeros_like(x) if dx is None else dx for (name, x), dx in zip(wanted.items(), found)}
    return Outcome([x.detach() for x in outputs], grads)


def judge(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    device: str = "cpu",
    gradients: bool = True,
    seed: int = 0,
) -> dict[str, Ratio]:
    """Error ratios of a backend on a case, by output number and gradient name."""

    def draw(**kwargs: Any) -> Inputs:
        return case.inputs(dtype, seed=seed, requires_grad=gradients, **kwargs)

    function = getattr(vdcore, case.op)
    ours = run(draw(layout=layout, device=device), function, gradients=gradients, layout=layout, backend=backend)
    exact = run(draw(stored=torch.float64), function, gradients=gradients, backend="reference")
    forms = [run(draw(), form, gradients=gradients) for form in TORCH_FORMS[case.op].values()]
    ratios = {
        f"output {i}": error_ratio(x, exact.outputs[i], [f.outputs[i] for f in forms])
        for i, x in enumerate(ours.outputs)
    }
    for name, dx in ours.gradients.items():
        ratios[name] = error_ratio(dx, exact.gradients[name], [f.gradients[name] for f in forms], gradient=True)
    return ratios


def check(case: Case, backend: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> dict[str, Ratio]:
    """As :func:`judge`; an ``AssertionError`` where the rule is broken."""
    ratios = judge(case, backend, dtype, **kwargs)
    broken = {name: r for name, r in ratios.items() if not r.worst <= 1}
    if broken:
        raise AssertionError(f"{case} on {backend} in {dtype}: error over what is allowed (maximum, rms): {broken}")
    return ratios
