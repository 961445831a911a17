"""Oracles of adaptive layer norm."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.norm import compute_dtype


def per_token(x: Tensor) -> Tensor:
    """``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)`` as ``(B, 1 or T, 1 or S, C)``."""
    return x if x.ndim == 4 else x[:, None, None] if x.ndim == 2 else x[:, :, None]


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` over the channels of x ``(B, T, S, C)``."""
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype)
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return (y * (1 + per_token(scale).to(dtype)) + per_token(shift).to(dtype)).to(x.dtype)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * x``."""
    dtype = compute_dtype(residual.dtype)
    return (residual.to(dtype) + per_token(gate).to(dtype) * x.to(dtype)).to(residual.dtype)
