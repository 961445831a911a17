"""Adaptive layer norm on the CPU engine: csrc/cpu/adaln.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import KINDS
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, capsule, float_weights, native, why_not

if TYPE_CHECKING:
    from vdcore.ops.adaln import GateResidualCall, ModulateCall


def _per_token(x: Tensor) -> Tensor:
    """``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)`` as ``(B, T or 1, S or 1, C)``."""
    return x if x.ndim == 4 else x[:, None, None] if x.ndim == 2 else x[:, :, None]


class _GroupSums:
    """Sums over the tokens that share a row, in parts: a sample's, or a frame's where one of the rows is per frame."""

    def __init__(self, x: Tensor, *rows: Tensor) -> None:
        B, T, S, C = x.shape
        self.per_frame = any(row.ndim == 3 for row in rows)
        groups, tokens = (B * T, S) if self.per_frame else (B, T * S)
        self.parts = min(tokens, -(-SUM_PARTS // groups))
        self.shape = (B, T if self.per_frame else 1, self.parts, C)

    def empty(self) -> Tensor:
        return torch.empty(self.shape)

    @staticmethod
    def total(sums: Tensor) -> Tensor:
        """``(B, T or 1, 1, C)`` in float64."""
        return sums.sum(2, keepdim=True, dtype=torch.float64)


def _like(total: Tensor, row: Tensor) -> Tensor:
    """Sums of groups ``(B, T or 1, 1, C)`` as the gradient of a row per sample or frame."""
    return total.sum((1, 2)) if row.ndim == 2 else total[:, :, 0]


# ---- modulate ----


def _modulate_arguments(c: ModulateCall, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """What both directions of the engine take."""
    return {
        "x": capsule(c.x),
        "shift": capsule(_per_token(c.shift)),
        "scale": capsule(_per_token(c.scale)),
        "weight": capsule(weight),
        "bias": capsule(bias),
        "kind": KINDS[c.kind],
        "eps": c.eps,
        "threads": torch.get_num_threads(),
    }


def _modulate_forward(c: ModulateCall) -> tuple[Tensor, ...]:
    (y,) = c.empty_outputs()
    weight, bias = float_weights(c.weight), float_weights(c.bias)
    native().modulate_forward(**_modulate_arguments(c, weight, bias), y=capsule(y))
    return (y,)


def _modulate_backward(
    c: ModulateCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    assert grads[0] is not None
    dy = unit_stride(grads[0])
    found: Gradients = {}
    if "shift" in wanted and c.shift.ndim == 4:
        found["shift"] = dy.clone(memory_format=torch.contiguous_format)
    if "x" in wanted:
        found["x"] = torch.empty(c.x.shape, dtype=c.x.dtype)
    shared = c.scale.ndim < 4  # then dz is dy, and one sum serves shift, scale, weight and bias
    if "scale" in wanted and not shared:
        found["scale"] = torch.empty(c.scale.shape, dtype=c.scale.dtype)

    sums = _GroupSums(c.x, c.shift, c.scale)
    of_dy = ("shift" in wanted and c.shift.ndim < 4) or (shared and bool(wanted & {"scale", "bias"}))
    of_dz = not shared and "bias" in wanted
    of_dz_x = "weight" in wanted or (shared and "scale" in wanted)
    dy_parts, dz_parts, dz_x_parts = (sums.empty() if yes else None for yes in (of_dy, of_dz, of_dz_x))
    weight, bias = float_weights(c.weight), float_weights(c.bias)
    native().modulate_backward(
        **_modulate_arguments(c, weight, bias),
        dy=capsule(dy),
        dx=capsule(found.get("x")),
        dscale=None if shared else capsule(found.get("scale")),
        scale_per_token=not shared,
        per_frame=sums.per_frame,
        parts=sums.parts,
        sum_dy=capsule(dy_parts),
        sum_dz=capsule(dz_parts),
        sum_dz_x=capsule(dz_x_parts),
    )
    sum_dy, sum_dz, sum_dz_x = (None if x is None else sums.total(x) for x in (dy_parts, dz_parts, dz_x_parts))
    factor = 1 + _per_token(c.scale).double() if shared else 1
    if sum_dy is not None and "shift" in wanted and c.shift.ndim < 4:
        found["shift"] = _like(sum_dy, c.shift)
    if sum_dz_x is not None and "scale" in wanted and shared:
        dscale = sum_dz_x if weight is None else sum_dz_x * weight
        if bias is not None and sum_dy is not None:
            dscale = dscale + sum_dy * bias
        found["scale"] = _like(dscale, c.scale)
    if sum_dz_x is not None and "weight" in wanted:
        found["weight"] = (sum_dz_x * factor).sum((0, 1, 2))
    if "bias" in wanted:
        total = sum_dy if shared else sum_dz
        assert total is not None
        found["bias"] = (total * factor).sum((0, 1, 2))
    return found


# ---- gate_residual ----


def _gate_residual_forward(c: GateResidualCall) -> tuple[Tensor, ...]:
    (y,) = c.empty_outputs()
    native().gate_residual_forward(
        residual=capsule(c.residual),
        x=capsule(c.x),
        gate=capsule(_per_token(c.gate)),
        y=capsule(y),
        threads=torch.get_num_threads(),
    )
    return (y,)


def _gate_residual_backward(
    c: GateResidualCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    assert grads[0] is not None
    dy = unit_stride(grads[0])
    found: Gradients = {}
    if "x" in wanted:
        found["x"] = torch.empty(c.x.shape, dtype=c.x.dtype)
    per_token = c.gate.ndim == 4
    if "gate" in wanted and per_token:
        found["gate"] = torch.empty(c.gate.shape, dtype=c.gate.dtype)
    sums = _GroupSums(c.x, c.gate)
    parts = sums.empty() if "gate" in wanted and not per_token else None
    native().gate_residual_backward(
        x=capsule(c.x),
        gate=capsule(_per_token(c.gate)),
        dy=capsule(dy),
        dx=capsule(found.get("x")),
        dgate=capsule(found.get("gate")),
        per_frame=sums.per_frame,
        parts=sums.parts,
        sum_dy_x=capsule(parts),
        threads=torch.get_num_threads(),
    )
    if parts is not None:
        found["gate"] = _like(sums.total(parts), c.gate)
    return found


def _modulate_why_not(c: ModulateCall) -> str | None:
    return why_not(c.x)


def _gate_residual_why_not(c: GateResidualCall) -> str | None:
    return why_not(c.residual)


MODULATE = Implementation(_modulate_forward, _modulate_backward, _modulate_why_not)
GATE_RESIDUAL = Implementation(_gate_residual_forward, _gate_residual_backward, _gate_residual_why_not)
