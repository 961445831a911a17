"""The host's adaptive norms and gated residuals on ``(B, T, S, C)``, in one pass where their form is vdcore's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers._attention import is_plain

_LAYER = (nn.LayerNorm, normalization.FP32LayerNorm)
_RMS = (normalization.RMSNorm,)


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``; shift and scale ``(B, C)`` or ``(B, T, S, C)``."""
    kind = "layer" if type(norm) in _LAYER else "rms" if type(norm) in _RMS else None
    known = kind is not None and is_plain(norm) and (kind == "layer" or norm.bias is None)
    if not known or not all(_fits(y, x) for y in (shift, scale, norm.weight, norm.bias)):
        return norm(x) * (1 + _spread(scale)) + _spread(shift)
    return vdcore.modulate(x, shift, scale, kind=str(kind), weight=norm.weight, bias=norm.bias, eps=norm.eps)


def gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * x``; gate ``(B, C)`` or ``(B, T, S, C)``."""
    if x.dtype != residual.dtype or not _fits(gate, residual):  # under autocast
        return residual + _spread(gate) * x
    return vdcore.gate_residual(residual, x, gate)


def _fits(y: Tensor | None, x: Tensor) -> bool:
    return y is None or y.dtype in (x.dtype, torch.float32)


def _spread(y: Tensor) -> Tensor:
    return y[:, None, None] if y.ndim == 2 else y
