"""Adaptive norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.triton import why_not

if TYPE_CHECKING:
    from vdcore.ops.adaln import GateResidualCall, ModulateCall


def _why_not_channels(c: ModulateCall | GateResidualCall) -> str | None:
    from vdcore_kernels.adaln.forward import MAX_CHANNELS

    if c.main.shape[-1] > MAX_CHANNELS:
        return f"it has at most {MAX_CHANNELS} channels, got {c.main.shape[-1]}"
    return why_not(c.main)


def _modulate(c: ModulateCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.adaln.forward import modulate_forward

    return (modulate_forward(c.x, c.shift, c.scale, c.weight, c.bias, kind=c.kind, eps=c.eps),)


def _modulate_backward(c: ModulateCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: Any) -> Gradients:
    from vdcore_kernels.adaln.backward import modulate_backward

    dy = unit_stride(grads[0]) if grads[0] is not None else torch.zeros_like(c.x)
    return modulate_backward(c.x, c.shift, c.scale, c.weight, c.bias, kind=c.kind, eps=c.eps, dy=dy, wanted=wanted)


def _gate_residual(c: GateResidualCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.adaln.forward import gate_residual_forward

    return (gate_residual_forward(c.residual, c.x, c.gate),)


def _gate_residual_backward(
    c: GateResidualCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: Any
) -> Gradients:
    from vdcore_kernels.adaln.backward import gate_residual_backward

    dy = unit_stride(grads[0]) if grads[0] is not None else torch.zeros_like(c.x)
    return gate_residual_backward(c.x, c.gate, dy, wanted)


MODULATE = Implementation(_modulate, _modulate_backward, _why_not_channels)
GATE_RESIDUAL = Implementation(_gate_residual, _gate_residual_backward, _why_not_channels)
