"""Tangents of adaptive layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore.norm import compute_dtype, normalized, normalized_tangent
from vdcore.ops.adaln.reference import per_token


def modulate(call: Any, given: dict[str, Tensor]) -> tuple[Tensor]:
    """``dy (1 + scale) + y dscale + dshift`` with ``y = norm(x)`` and its tangent, ``(B, T, S, C)``."""
    dtype = compute_dtype(call.x.dtype)
    given = {name: x.to(dtype) for name, x in given.items()}
    y, factor = normalized(call.x.to(dtype), call.kind, call.eps)
    weight = 1 if call.weight is None else call.weight.to(dtype)
    dy = torch.zeros_like(y)
    if "x" in given:
        dy = normalized_tangent(y, factor, given["x"], call.kind) * weight
    if "weight" in given:
        dy = dy + y * given["weight"]
    if "bias" in given:
        dy = dy + given["bias"]
    out = dy * (1 + per_token(call.scale).to(dtype))
    if "scale" in given:
        y = y * weight if call.bias is None else y * weight + call.bias.to(dtype)
        out = out + y * per_token(given["scale"])
    if "shift" in given:
        out = out + per_token(given["shift"])
    return (out.to(call.x.dtype),)


def gate_residual(call: Any, given: dict[str, Tensor]) -> tuple[Tensor]:
    """``dresidual + gate dx + dgate x``, ``(B, T, S, C)``."""
    dtype = compute_dtype(call.residual.dtype)
    given = {name: x.to(dtype) for name, x in given.items()}
    out = given["residual"] if "residual" in given else torch.zeros_like(call.residual, dtype=dtype)
    if "x" in given:
        out = out + per_token(call.gate).to(dtype) * given["x"]
    if "gate" in given:
        out = out + per_token(given["gate"]) * call.x.to(dtype)
    return (out.to(call.residual.dtype),)
