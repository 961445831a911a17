"""Adaptive layer norm: the modulation before a block and the gated residual after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vdcore.norm import check_eps
from vdcore.ops import check
from vdcore.ops.adaln import cpu, reference, tangents, triton
from vdcore.ops.call import Call, empty_like
from vdcore.ops.operator import by_formula, register, run


@dataclass
class ModulateCall(Call):
    """x ``(B, T, S, C)``, shift and scale ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)``, weight and bias ``(C,)``."""

    op: ClassVar[str] = "modulate"

    x: Tensor
    shift: Tensor
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None
    kind: str
    eps: float

    def empty_outputs(self) -> tuple[Tensor]:
        return (empty_like(self.x),)


@dataclass
class GateResidualCall(Call):
    """residual and x ``(B, T, S, C)``, gate as shift in :class:`ModulateCall`."""

    op: ClassVar[str] = "gate_residual"
    PASSED: ClassVar[dict[str, int]] = {"residual": 0}

    residual: Tensor
    x: Tensor
    gate: Tensor

    def empty_outputs(self) -> tuple[Tensor]:
        return (empty_like(self.residual),)


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
    op = ModulateCall.op
    x = check.unit_stride(check.check_main(op, "x", x, "(B, T, S, C)"))
    shift, scale = (_check_per_token(op, n, y, x, "x") for n, y in (("shift", shift), ("scale", scale)))
    if kind not in ("layer", "rms"):
        check.wrong(op, "kind", "'layer' or 'rms'", repr(kind))
    for name, y in (("weight", weight), ("bias", bias)):
        if y is not None:
            check.check_like(op, name, y, x, "x", or_float32=True)
            check.check_shape(op, name, y, (x.shape[-1],), "(C,)")
    check_eps(op, eps)
    return run(ModulateCall(x, shift, scale, weight, bias, kind, eps), backend)


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
    op = GateResidualCall.op
    residual = check.unit_stride(check.check_main(op, "residual", residual, "(B, T, S, C)"))
    check.check_like(op, "x", x, residual, "residual")
    check.check_shape(op, "x", x, residual.shape, "the shape of residual")
    gate = _check_per_token(op, "gate", gate, residual, "residual")
    return run(GateResidualCall(residual, check.unit_stride(x), gate), backend)


def _check_per_token(op: str, name: str, value: Any, x: Tensor, main: str) -> Tensor:
    check.check_like(op, name, value, x, main, or_float32=True)
    B, T, S, C = x.shape
    shapes = ((B, C), (B, T, C), (B, T, S, C))
    if tuple(value.shape) not in shapes:
        check.wrong(op, name, f"(B, C), (B, T, C) or (B, T, S, C) with {(B, T, S, C)}", check.shape_of(value))
    return check.unit_stride(value)


register(
    modulate,
    ModulateCall,
    tangents.modulate,
    reference=by_formula(reference.modulate),
    cpu=cpu.MODULATE,
    triton=triton.MODULATE,
)
register(
    gate_residual,
    GateResidualCall,
    tangents.gate_residual,
    reference=by_formula(reference.gate_residual),
    cpu=cpu.GATE_RESIDUAL,
    triton=triton.GATE_RESIDUAL,
)
