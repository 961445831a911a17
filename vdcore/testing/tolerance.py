"""The tolerance rule: at most twice PyTorch's own error in the same dtype, and 2 ulp (after FlashAttention's tests).

Errors of both sides are pooled over several draws of a case, for the maximum and for the RMS error: the largest error
of one draw is an extreme value, and a lucky one of PyTorch's would fail a kernel that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ratio(NamedTuple):
    """Error over what the rule allows, for the largest and for the RMS error: fine up to 1."""

    maximum: float
    rms: float

    @property
    def worst(self) -> float:
        return max(self.maximum, self.rms)


class Errors(NamedTuple):
    """Distance of a result from the float64 reference.

    Args:
        maximum: the largest error.
        rms: the root of the mean squared error.
        scale: the largest value of the reference.
    """

    maximum: float
    rms: float
    scale: float


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of the dtype at this magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def errors(x: Tensor, exact: Tensor) -> Errors:
    """Errors where ``exact`` is finite; infinite ones if infinities and NaN do not stand where ``exact`` has them."""
    if x.shape != exact.shape:
        raise AssertionError(f"shape {tuple(x.shape)} where {tuple(exact.shape)} was expected")
    exact = exact.detach().to(torch.float64)
    x = x.detach().to(exact.device, torch.float64)
    finite = exact.isfinite()
    if not torch.equal(
        x[~finite].nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0),
        exact[~finite].nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0),
    ):
        return Errors(math.inf, math.inf, 0.0)
    if not finite.any():
        return Errors(0.0, 0.0, 0.0)
    error = (x[finite] - exact[finite]).abs()
    found = Errors(error.max().item(), error.square().mean().sqrt().item(), exact[finite].abs().max().item())
    return found if math.isfinite(found.maximum) else Errors(math.inf, math.inf, found.scale)


def pooled(draws: Sequence[Errors]) -> Errors:
    """Errors over all draws of one case, which have the same number of values.

    The draws' largest errors are averaged: the largest of them all is one extreme value again. (All cases, on the CPU
    engine, SDPA and the reference, with ATen's three CPU capabilities: right kernels come to 0.71 of the rule at most,
    by the largest of four draws to 1.05.)
    """
    n = len(draws)
    return Errors(
        sum(e.maximum for e in draws) / n,
        math.sqrt(sum(e.rms**2 for e in draws) / n),
        max(e.scale for e in draws),
    )


def ratio(ours: Errors, forms: Sequence[Errors], dtype: torch.dtype, *, gradient: bool = False) -> Ratio:
    """``err(ours) / (factor * err(PyTorch) + 2 ulp)`` with factor 2, or 3 for gradients.

    Args:
        ours: errors on trial, pooled over draws.
        forms: PyTorch's pooled errors, an entry per form; the most exact form counts, separately for the maximum and
            the RMS error.
        dtype: of the result; gives the ulp.
        gradient: ours is a gradient.
    """
    spare = 2 * ulp(ours.scale, dtype)
    factor = 3 if gradient else 2

    def over(mine: float, theirs: Sequence[float]) -> float:
        return mine / (factor * min((e for e in theirs if math.isfinite(e)), default=0.0) + spare)

    return Ratio(over(ours.maximum, [e.maximum for e in forms]), over(ours.rms, [e.rms for e in forms]))


Draws = Tensor | Sequence[Tensor]


def error_ratio(ours: Draws, exact: Draws, torch_results: Sequence[Draws], *, gradient: bool = False) -> Ratio:
    """The rule on results at hand: a tensor each, or one per draw.

    Infinities and NaN must stand where ``exact`` has them, else the ratio is infinite; errors are taken over the rest.

    Args:
        ours: the result on trial; its dtype gives the ulp.
        exact: the float64 reference.
        torch_results: what PyTorch computes in the same dtype, an entry per form.
        gradient: ours is a gradient.
    """

    def draws(x: Draws) -> Sequence[Tensor]:
        return [x] if isinstance(x, Tensor) else x

    def over_draws(x: Draws) -> Errors:
        return pooled([errors(one, e) for one, e in zip(draws(x), draws(exact), strict=True)])

    mine = over_draws(ours)
    return ratio(mine, [over_draws(x) for x in torch_results], draws(ours)[0].dtype, gradient=gradient)
