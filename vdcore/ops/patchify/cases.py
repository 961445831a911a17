"""Cases of patches; the forms are the reference in float32, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.alternatives import BIAS, Choice, Sizes, draw_bias, space
from vdcore.ops.cases import case
from vdcore.ops.patchify import reference

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


@case("patchify", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 40, 4, 1, 2, 2, spread=0.25)
    return {"video": d("video", 2, 4, 3, 6, 10), "weight": weight, "bias": d("bias", 40)}


@case("patchify", "3D patches, no bias", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"video": d("video", 1, 3, 4, 6, 9), "weight": d("weight", 17, 3, 2, 2, 3, spread=0.2)}


@case("patchify", "one token a pixel")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 24, 16, 1, 1, 1, spread=0.25)
    return {"video": d("video", 2, 16, 2, 5, 7), "weight": weight, "bias": d("bias", 24, dtype=torch.float32)}


def _patchify_form(video: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.patchify(video, weight, bias)


@case("unpatchify", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 4 * 4, 40, spread=0.15)
    return {
        **{"tokens": d("tokens", 2, 3, 15, 40), "weight": weight, "bias": d("bias", 16)},
        **{"channels": 4, "patch": (1, 2, 2), "grid": (3, 3, 5)},
    }


@case("unpatchify", "3D patches, channels first", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 3 * 12, 17, spread=0.25)
    return {
        **{"tokens": d("tokens", 1, 2, 6, 17), "weight": weight, "order": "c pt ph pw"},
        **{"channels": 3, "patch": (2, 2, 3), "grid": (2, 2, 3)},
    }


def _unpatchify_form(
    tokens: Tensor, weight: Tensor, bias: Tensor | None = None, *, order: str = "pt ph pw c", **kwargs: Any
) -> Tensor:
    return reference.unpatchify(tokens, weight, bias, order=order, **kwargs)


# ---- How it may be called ----


PATCHES = ((1, 2, 2), (2, 2, 3), (1, 1, 1), (4, 1, 2))


@space(
    "patchify",
    patch=PATCHES,
    channels=(1, 3, 16),
    bias=BIAS,
)
def _patchify(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    pt, ph, pw = c["patch"]
    C = c["channels"]
    video = d("video", n.B, C, n.T * pt, n.S * ph, n.L * pw)
    weight = d("weight", n.D, C, pt, ph, pw, spread=0.3)
    return {"video": video, "weight": weight, "bias": draw_bias(d, c["bias"], n.D)}


@space(
    "unpatchify",
    patch=PATCHES,
    channels=(1, 3, 16),
    bias=BIAS,
    order=("pt ph pw c", "c pt ph pw"),
)
def _unpatchify(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    rows = c["channels"] * c["patch"][0] * c["patch"][1] * c["patch"][2]
    return {
        "tokens": d("tokens", n.B, n.T, n.S * n.L, n.D),
        "weight": d("weight", rows, n.D, spread=0.3),
        "bias": draw_bias(d, c["bias"], rows),
        "channels": c["channels"],
        "patch": c["patch"],
        "grid": (n.T, n.S, n.L),
        "order": c["order"],
    }


FORMS = {
    "patchify": {"eager": _patchify_form},
    "unpatchify": {"eager": _unpatchify_form},
}
