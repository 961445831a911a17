"""Cases of norm and rope; the form is the reference in float32, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.alternatives import NORM_ROPE, Choice, Sizes, draw_norm, draw_qkv, draw_rope, heads_allow, space
from vdcore.ops.cases import case
from vdcore.ops.qk_norm_rope import reference
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


@case("qk_norm_rope", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 4, 5, 3, 40), d("k", 2, 4, 5, 3, 40)
    return {"q": q, "k": k, "norm": d.norm(3, 3, 40), "rope": d.rope(4, 5, 20)}


@case("qk_norm_rope", "layer norm over all heads, half, grouped")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 3, 4, 4, 18), d("k", 2, 3, 4, 2, 18)
    norm = d.norm(4, 2, 18, "layer", "all", dtype=torch.float32)
    return {"q": q, "k": k, "norm": norm, "rope": d.rope(8, 1, 6, style="half"), "frame_start": 5}


@case("qk_norm_rope", "per head, no weights")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 1, 3, 7, 2, 32), d("k", 1, 3, 7, 2, 32)
    return {"q": q, "k": k, "norm": QKNorm(None, None, "layer"), "rope": d.rope(3, 7, 2, 16, dtype=torch.float32)}


@case("qk_norm_rope", "rms over all heads, one rope for all frames", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 2, 6, 3, 20), d("k", 2, 2, 6, 3, 20)
    return {"q": q, "k": k, "norm": d.norm(3, 3, 20, over="all"), "rope": d.rope(1, 6, 10)}


@case("qk_norm_rope", "layer norm over all of twelve heads")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 1, 2, 3, 12, 128), d("k", 1, 2, 3, 12, 128)
    return {"q": q, "k": k, "norm": d.norm(12, 12, 128, "layer", "all"), "rope": d.rope(2, 3, 64)}


def _qk_norm_rope_form(
    q: Tensor, k: Tensor, *, norm: QKNorm | None = None, rope: Rope | None = None, frame_start: int = 0
) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope(q, k, norm=norm, rope=rope, frame_start=frame_start)


# ---- How it may be called ----


@space(
    "qk_norm_rope",
    heads_allow,
    keys=("same",),
    heads=("equal", "grouped"),
    **NORM_ROPE,
    frame_start=(0, 2),
)
def _qk_norm_rope(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, T_k, G = draw_qkv(d, c, n)
    frames = c["frame_start"] + max(n.T, T_k)
    return {
        "q": tensors["q"],
        "k": tensors["k"],
        "norm": draw_norm(d, c["norm"], n.H, G, n.D),
        "rope": draw_rope(d, c["rope"], frames, n.S, n.H, n.D),
        "frame_start": c["frame_start"],
    }


FORMS = {
    "qk_norm_rope": {"eager": _qk_norm_rope_form},
}
