"""Cross attention's cases, and PyTorch's form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.alternatives import NORMS, Choice, Sizes, draw_lengths, draw_norm, space
from vdcore.ops.cases import Attend, case, dense, with_each

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


@case("cross_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"q": d("q", 2, 3, 5, 2, 40), "k": d("k", 2, 11, 2, 40), "v": d("v", 2, 11, 2, 40)}


@case("cross_attention", "lengths", "masked")
def _(d: Draw) -> dict[str, Any]:
    q, k, v = d("q", 3, 2, 5, 4, 16), d("k", 3, 9, 2, 16), d("v", 3, 9, 2, 16)
    return {"q": q, "k": k, "v": v, "lengths": d.integers(9, 4, 0), "return_lse": True}


@case("cross_attention", "a prompt per frame", "masked", "norm_rope", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k, v = d("q", 2, 3, 4, 2, 24), d("k", 2, 3, 6, 2, 24), d("v", 2, 3, 6, 2, 24)
    return {
        **{"q": q, "k": k, "v": v, "norm": d.norm(2, 2, 24, over="all"), "scale": 0.5},
        "lengths": d.integers(6, 1, 0, 3, 5, 2).reshape(2, 3),
    }


def _cross_form(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    return_lse: bool = False,
) -> Any:
    B, T, S, _, D = q.shape
    if norm is not None:
        q, k = norm.q(q).to(q.dtype), norm.k(k).to(k.dtype)
    L = k.shape[-3]
    if k.ndim == 4:
        k, v = (x[:, None].expand(B, T, *x.shape[1:]) for x in (k, v))
    seen = None
    if lengths is not None:
        valid = lengths.reshape(B, -1).expand(B, T)
        seen = (torch.arange(L, device=q.device) < valid[..., None]).flatten(0, 1)[:, None, None]
        seen = seen.expand(B * T, 1, S, L)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = dense(attend, q, k, v, seen, D**-0.5 if scale is None else scale, return_lse)
    out = out.unflatten(0, (B, T))
    return (out, lse.unflatten(0, (B, T))) if lse is not None else out


# ---- How it may be called ----


@space(
    "cross_attention",
    keys=("sample", "frame"),
    lengths=(None, "some", "beyond", "int32"),
    lengths_per=("sample", "frame"),
    heads=("equal", "grouped"),
    scale=(None, 0.3, -0.2),
    norm=NORMS,
    return_lse=(False, True),
)
def _cross(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    G = n.H // 2 if c["heads"] == "grouped" else n.H
    keys = (n.B, n.T, n.L, G, n.D) if c["keys"] == "frame" else (n.B, n.L, G, n.D)
    lengths = (n.B, n.T) if c["lengths_per"] == "frame" else (n.B,)
    return {
        "q": d("q", n.B, n.T, n.S, n.H, n.D),
        "k": d("k", *keys),
        "v": d("v", *keys),
        "lengths": draw_lengths(d, c["lengths"], lengths, n.L),
        "scale": c["scale"],
        "norm": draw_norm(d, c["norm"], n.H, G, n.D),
        "return_lse": c["return_lse"],
    }


FORMS = {
    "cross_attention": with_each(_cross_form),
}
