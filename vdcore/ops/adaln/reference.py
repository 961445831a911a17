"""Oracles of adaptive layer norm."""

from __future__ import annotations

from torch import Tensor

from vdcore.norm import compute_dtype, normalized


def per_token(x: Tensor) -> Tensor:
    """``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)`` as ``(B, 1 or T, 1 or S, C)``."""
    return x if x.ndim == 4 else x[:, None, None] if x.ndim == 2 else x[:, :, None]


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` over the channels of x ``(B, T, S, C)``."""
    dtype = compute_dtype(x.dtype)
    y, _ = normalized(x.to(dtype), kind, eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return (y * (1 + per_token(scale).to(dtype)) + per_token(shift).to(dtype)).to(x.dtype)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * x``."""
    dtype = compute_dtype(residual.dtype)
    return (residual.to(dtype) + per_token(gate).to(dtype) * x.to(dtype)).to(residual.dtype)
