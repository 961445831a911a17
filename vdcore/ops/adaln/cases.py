"""Cases of adaptive norm; the forms are the reference in float32, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.adaln import reference
from vdcore.ops.cases import case

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


@case("modulate", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"x": d("x", 2, 3, 5, 40), "shift": d("shift", 2, 40), "scale": d("scale", 2, 40)}


@case("modulate", "per frame, weights")
def _(d: Draw) -> dict[str, Any]:
    return {
        **{"x": d("x", 2, 3, 5, 33), "shift": d("shift", 2, 3, 33), "scale": d("scale", 2, 3, 33, dtype=torch.float32)},
        **{"weight": d("weight", 33, around=1.0), "bias": d("bias", 33), "eps": 1e-5},
    }


@case("modulate", "per token, rms", "layout")
def _(d: Draw) -> dict[str, Any]:
    shift, scale = d("shift", 1, 4, 3, 72), d("scale", 1, 72)
    return {"x": d("x", 1, 4, 3, 72), "shift": shift, "scale": scale, "kind": "rms"}


def _modulate_form(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return reference.modulate(x, shift, scale, kind=kind, weight=weight, bias=bias, eps=eps)


@case("gate_residual", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"residual": d("residual", 2, 3, 5, 40), "x": d("x", 2, 3, 5, 40), "gate": d("gate", 2, 40)}


@case("gate_residual", "per frame")
def _(d: Draw) -> dict[str, Any]:
    gate = d("gate", 2, 4, 19, dtype=torch.float32)
    return {"residual": d("residual", 2, 4, 3, 19), "x": d("x", 2, 4, 3, 19), "gate": gate}


@case("gate_residual", "per token", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"residual": d("residual", 1, 2, 9, 64), "x": d("x", 1, 2, 9, 64), "gate": d("gate", 1, 2, 9, 64)}


FORMS = {
    "modulate": {"eager": _modulate_form},
    "gate_residual": {"eager": reference.gate_residual},
}
