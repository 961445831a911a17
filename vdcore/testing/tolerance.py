"""The tolerance rule: at most twice PyTorch's own error in the same dtype, and 2 ulp (after FlashAttention's tests)."""

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


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of the dtype at this magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def _errors(x: Tensor, exact: Tensor) -> tuple[float, float]:
    error = (x.detach().to(exact.device, torch.float64) - exact).abs()
    return error.max().item(), error.square().mean().sqrt().item()


def error_ratio(ours: Tensor, exact: Tensor, torch_results: Sequence[Tensor], *, gradient: bool = False) -> Ratio:
    """``err(ours) / (factor * err(PyTorch) + 2 ulp)`` with factor 2, or 3 for gradients.

    Infinities and NaN must stand where ``exact`` has them, else the ratio is infinite; errors are taken over the rest.

    Args:
        ours: the result on trial; its dtype gives the ulp.
        exact: the float64 reference.
        torch_results: what PyTorch computes in the same dtype, one tensor per form; the most exact of them counts,
            separately for the maximum and the RMS error.
        gradient: ours is a gradient.
    """
    if ours.shape != exact.shape:
        raise AssertionError(f"shape {tuple(ours.shape)} where {tuple(exact.shape)} was expected")
    exact = exact.detach().to(torch.float64)
    finite = exact.isfinite()
    strange = ours.detach().to(exact.device, torch.float64)[~finite]
    if not torch.equal(
        strange.nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0),
        exact[~finite].nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0),
    ):
        return Ratio(math.inf, math.inf)
    if not finite.any():
        return Ratio(0.0, 0.0)
    exact_values = exact[finite]
    mine = _errors(ours[finite.to(ours.device)], exact_values)
    theirs = [_errors(x[finite.to(x.device)], exact_values) for x in torch_results]
    spare = 2 * ulp(exact_values.abs().max().item(), ours.dtype)
    factor = 3 if gradient else 2
    ratios = []
    for i, error in enumerate(mine):
        allowed = factor * min((e[i] for e in theirs if math.isfinite(e[i])), default=0.0) + spare
        ratios.append(error / allowed if math.isfinite(error) else math.inf)
    return Ratio(*ratios)
