"""Adaptive layer norm: the modulation before a block and the gated residual after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import GateResidualCall, ModulateCall
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run

MODULATE, GATE_RESIDUAL = "modulate", "gate_residual"


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, the adaptive norm of DiT (Peebles and Xie 2023).

    Args:
        x: ``(B, T, S, C)``; the norm is over C.
        shift, scale: ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)``, each on its own.
        kind: ``"layer"`` or ``"rms"``.
        weight, bias: ``(C,)``, of the norm.
        eps: added to the variance or mean square.
        backend: run on this one or raise.

    Returns:
        ``(B, T, S, C)`` in x's dtype.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    return run(_prepare_modulate(x, shift, scale, kind=kind, weight=weight, bias=bias, eps=eps), backend)


def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """``residual + gate * x``.

    Args:
        residual, x: ``(B, T, S, C)``.
        gate: ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)``.
        backend: run on this one or raise.

    Returns:
        ``(B, T, S, C)`` in residual's dtype.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    return run(_prepare_gate_residual(residual, x, gate), backend)


def _check_per_token(op: str, name: str, value: Any, x: Tensor, main: str) -> Tensor:
    check.check_like(op, name, value, x, main, or_float32=True)
    B, T, S, C = x.shape
    shapes = ((B, C), (B, T, C), (B, T, S, C))
    if tuple(value.shape) not in shapes:
        check.wrong(op, name, f"(B, C), (B, T, C) or (B, T, S, C) with {(B, T, S, C)}", check.shape_of(value))
    return check.unit_stride(value)


def _prepare_modulate(
    x: Any, shift: Any, scale: Any, *, kind: str = "layer", weight: Any = None, bias: Any = None, eps: float = 1e-6
) -> ModulateCall:
    op = MODULATE
    x = check.unit_stride(check.check_main(op, "x", x, "(B, T, S, C)"))
    shift, scale = (_check_per_token(op, n, y, x, "x") for n, y in (("shift", shift), ("scale", scale)))
    if kind not in ("layer", "rms"):
        check.wrong(op, "kind", "'layer' or 'rms'", repr(kind))
    for name, y in (("weight", weight), ("bias", bias)):
        if y is not None:
            check.check_like(op, name, y, x, "x", or_float32=True)
            check.check_shape(op, name, y, (x.shape[-1],), "(C,)")
    return ModulateCall(op, check.wants_grad(x, shift, scale, weight, bias), x, shift, scale, weight, bias, kind, eps)


def _prepare_gate_residual(residual: Any, x: Any, gate: Any) -> GateResidualCall:
    op = GATE_RESIDUAL
    residual = check.unit_stride(check.check_main(op, "residual", residual, "(B, T, S, C)"))
    check.check_like(op, "x", x, residual, "residual")
    check.check_shape(op, "x", x, residual.shape, "the shape of residual")
    gate = _check_per_token(op, "gate", gate, residual, "residual")
    return GateResidualCall(op, check.wants_grad(residual, x, gate), residual, check.unit_stride(x), gate)


register(MODULATE, ModulateCall, _prepare_modulate)
register(GATE_RESIDUAL, GateResidualCall, _prepare_gate_residual)
