"""The host's adaptive norms and gated residuals in one pass where their form is vdcore's.

On ``(B, T, S, C)``, or on rows ``(B, N, C)``; shifts, scales and gates are by sample or by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers.attention import same_batch
from vdcore.integrations.swap import is_plain

_LAYER = (nn.LayerNorm, normalization.FP32LayerNorm)
_RMS = (normalization.RMSNorm,)

GATED = "modulate, gate_residual"  # what serves a block that does both
# Reasons to leave a call to the host.
NEITHER = "modulation that is by neither sample nor token"
RANK = "rows of another rank"

# Parts of a table of modulations: (B, C) by sample, or (B, 1, N, C) by token.
Parts = tuple[Tensor, ...]
Layer = Callable[[Tensor], Tensor]


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``; shift and scale ``(B, C)`` or ``(B, T, S, C)``, or one for all samples."""
    x, shift, scale = same_batch(x, shift, scale)
    return _modulated(norm, x, shift, scale, is_plain(norm))


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, plain: bool) -> Tensor:
    kind = "layer" if type(norm) in _LAYER else "rms" if type(norm) in _RMS else None
    known = kind is not None and plain and (kind == "layer" or norm.bias is None)
    if not known or not all(_fits(y, x) for y in (shift, scale, norm.weight, norm.bias)):
        return norm(x) * (1 + _spread(scale)) + _spread(shift)
    return vdcore.modulate(x, shift, scale, kind=str(kind), weight=norm.weight, bias=norm.bias, eps=norm.eps)


def gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * x``; gate ``(B, C)`` or ``(B, T, S, C)``; each for all samples if it is of one."""
    residual, x, gate = same_batch(residual, x, gate)
    if x.dtype != residual.dtype or not _fits(gate, residual):  # under autocast
        return residual + _spread(gate) * x
    return vdcore.gate_residual(residual, x, gate)


def modulated_rows(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As :func:`modulated`, of rows ``(B, N, C)``, which a norm that is called gets."""
    if not is_plain(norm):
        return (norm(x).unsqueeze(1) * (1 + _spread(scale)) + _spread(shift)).squeeze(1)
    x, shift, scale = same_batch(x.unsqueeze(1), shift, scale)
    return _modulated(norm, x, shift, scale, True).squeeze(1)


def gated_rows(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """As :func:`gated`, of rows ``(B, N, C)``."""
    return gated(residual.unsqueeze(1), x.unsqueeze(1), gate).squeeze(1)


def transformer_block(
    x: Tensor, parts: Parts, norms: tuple[Any, Any], attend: Layer, cross: Layer | None, feed: Layer
) -> Tensor:
    """Attention, cross attention without modulation, and a feed-forward layer, on rows ``(B, N, C)``.

    Args:
        parts: shift, scale and gate of attention, then of the feed-forward layer.
        norms: before either.
    """
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    given = x
    x = gated_rows(x, attend(modulated_rows(norms[0], x, shift, scale)), gate)
    if cross is not None:
        x = x + cross(x)
    return _as_given(gated_rows(x, feed(modulated_rows(norms[1], x, shift_mlp, scale_mlp)), gate_mlp), given)


def _as_given(x: Tensor, given: Tensor) -> Tensor:
    """Rows ``(B, N, C)`` of one sample with the stride of the batch that a flattened patch embedding has.

    It means nothing, but a compiler guards it: code for the first block would not do for the second.
    """
    if len(x) != 1 or x.stride(0) == given.stride(0) or given.stride()[1:] != x.stride()[1:]:
        return x
    return x.transpose(1, 2).unsqueeze(2).flatten(2).transpose(1, 2)


def parts_of(table: Tensor, temb: Tensor) -> Parts:
    """``table (n, C)`` plus ``temb (B, 1 or N, n C)``, row by row."""
    both = table.to(temb.device) + temb.unflatten(-1, (len(table), -1))  # (B, 1 or N, n, C)
    return (both[:, 0] if temb.shape[1] == 1 else both.unsqueeze(1)).unbind(-2)


def by_sample_or_token(x: Tensor, *tembs: Tensor) -> bool:
    """Every ``temb`` is ``(B, 1 or N, ...)`` for rows ``(B, N, C)``."""
    return x.ndim == 3 and all(temb.ndim == 3 and temb.shape[1] in (1, x.shape[1]) for temb in tembs)


def _fits(y: Tensor | None, x: Tensor) -> bool:
    return y is None or y.dtype in (x.dtype, torch.float32)


def _spread(y: Tensor) -> Tensor:
    return y[:, None, None] if y.ndim == 2 else y
