"""Cases of adaptive norm; the forms are the reference in float32, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.adaln import reference
from vdcore.ops.alternatives import BIAS, Choice, Sizes, draw_bias, space
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


# ---- How it may be called ----


PER = ("sample", "frame", "token", "sample, float32", "frame, float32")


def _per(d: Draw, name: str, given: str, n: Sizes) -> Tensor:
    shapes = {"sample": (n.B, n.D), "frame": (n.B, n.T, n.D), "token": (n.B, n.T, n.S, n.D)}
    return d(name, *shapes[given.split(",")[0]], spread=0.5, dtype=torch.float32 if "float32" in given else None)


@space(
    "modulate",
    shift=PER,
    scale=PER,
    kind=("layer", "rms"),
    weight=BIAS,
    bias=BIAS,
)
def _modulate(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    wide = {"float32": torch.float32}
    x, shift, scale = d("x", n.B, n.T, n.S, n.D), _per(d, "shift", c["shift"], n), _per(d, "scale", c["scale"], n)
    weight = None if c["weight"] is None else d("weight", n.D, around=1.0, spread=0.3, dtype=wide.get(c["weight"]))
    return {
        "x": x,
        "shift": shift,
        "scale": scale,
        "kind": c["kind"],
        "weight": weight,
        "bias": draw_bias(d, c["bias"], n.D),
    }


@space(
    "gate_residual",
    gate=PER,
)
def _gate_residual(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    shape = (n.B, n.T, n.S, n.D)
    return {"residual": d("residual", *shape), "x": d("x", *shape), "gate": _per(d, "gate", c["gate"], n)}


FORMS = {
    "modulate": {"eager": _modulate_form},
    "gate_residual": {"eager": reference.gate_residual},
}
