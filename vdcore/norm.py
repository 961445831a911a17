"""Normalisation of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KINDS = {"rms": 1, "layer": 2}  # with the numbers that kernels know them by


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and products are taken in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def normalized(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """x over its last dimension, without weight, and what it was multiplied by: ``1 / sqrt(mean(x**2) + eps)``."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * factor, factor


def normalized_tangent(y: Tensor, factor: Tensor, dx: Tensor, kind: str) -> Tensor:
    """The tangent of :func:`normalized`'s y: ``factor * (dx - y mean(y dx))``, of dx without its mean if x is."""
    if kind == "layer":
        dx = dx - dx.mean(-1, keepdim=True)
    return factor * (dx - y * (y * dx).mean(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class QKNorm:
    """A norm on q and k, before rope.

    ``rms``: ``x / sqrt(mean(x**2) + eps) * weight`` (Zhang and Sennrich 2019);
    ``layer``: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` (Ba et al. 2016).

    Args:
        q_weight, k_weight: ``(D,)``, or ``(H*D,)`` and ``(G*D,)`` with ``over="all"``; ``None``: no weight.
        kind: ``"rms"`` or ``"layer"``.
        over: ``"head"``: over the D channels of a head; ``"all"``: over all heads of a token at once.
        eps: added to the mean square or variance.
        q_bias, k_bias: as the weights, ``kind="layer"`` only.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    kind: Literal["rms", "layer"] = "rms"
    over: Literal["head", "all"] = "head"
    eps: float = 1e-6
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"QKNorm: kind must be 'rms' or 'layer', got {self.kind!r}")
        if self.over not in ("head", "all"):
            raise ValueError(f"QKNorm: over must be 'head' or 'all', got {self.over!r}")
        check_eps("QKNorm", self.eps)
        if self.kind == "rms" and (self.q_bias is not None or self.k_bias is not None):
            raise ValueError("QKNorm: q_bias and k_bias must be None with kind='rms'")

    def q(self, x: Tensor) -> Tensor:
        """Normalises queries ``(..., H, D)``; float32 at least."""
        return self._apply(x, self.q_weight, self.q_bias)

    def k(self, x: Tensor) -> Tensor:
        """Normalises keys ``(..., G, D)``; float32 at least."""
        return self._apply(x, self.k_weight, self.k_bias)

    def _apply(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x.dtype)
        y = x.to(dtype)
        if self.over == "all":
            y = y.flatten(-2)
        y, _ = normalized(y, self.kind, self.eps)
        if weight is not None:
            y = y * weight.to(dtype)
        if bias is not None:
            y = y + bias.to(dtype)
        return y.reshape(x.shape)
