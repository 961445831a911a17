"""Gated attention's cases, and PyTorch's form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.alternatives import (
    MASKS,
    NORM_ROPE,
    NORMS,
    ROPES,
    Choice,
    Sizes,
    draw_lengths,
    draw_mask,
    draw_norm,
    draw_qkv,
    draw_rope,
    space,
)
from vdcore.ops.cases import Attend, case, with_each
from vdcore.ops.frame_attention.cases import video_form
from vdcore.ops.temporal_attention.cases import temporal_form
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


@case("gated_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    spatial, temporal = (tuple(d.qkv(2, 4, 9, 2, 24, prefix=p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 2, 1, 9, 2, 1, around=0.5, spread=0.2)}


@case("gated_attention", "shared tensors, scalar gate")
def _(d: Draw) -> dict[str, Any]:
    qkv = tuple(d.qkv(1, 5, 6, 3, 16).values())
    return {"spatial": qkv, "temporal": qkv, "gate": d.leaf("gate", torch.tensor(0.3)), "mask": FrameMask.causal()}


@case("gated_attention", "norm, rope, lengths", "norm_rope", "masked")
def _(d: Draw) -> dict[str, Any]:
    spatial = tuple(d.qkv(2, 4, 3, 2, 16, G=1).values())
    temporal = tuple(d.qkv(2, 4, 3, 2, 16, prefix="temporal_").values())
    return {
        "spatial": spatial,
        "temporal": temporal,
        "gate": d("gate", 16, around=0.5, spread=0.2, dtype=torch.float32),
        "norm": (d.norm(2, 1, 16), d.norm(2, 2, 16, "layer", "all", prefix="temporal_")),
        "rope": (d.rope(1, 3, 8), d.rope(4, 1, 8, style="half", prefix="temporal_")),
        "lengths": d.integers(3, 4),
        "mask": FrameMask.window(1),
    }


@case("gated_attention", "teacher forcing", "masked")
def _(d: Draw) -> dict[str, Any]:
    spatial, temporal = (tuple(d.qkv(1, 6, 3, 2, 16, prefix=p).values()) for p in ("", "temporal_"))
    gate = d("gate", 2, 1, around=0.5, spread=0.2)
    return {"spatial": spatial, "temporal": temporal, "gate": gate, "mask": FrameMask.teacher_forcing(3, 2)}


@case("gated_attention", "gate of full size", "layout")
def _(d: Draw) -> dict[str, Any]:
    spatial, temporal = (tuple(d.qkv(1, 3, 7, 2, 16, prefix=p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 1, 3, 7, 2, 16, around=0.5, spread=0.2)}


def _gated_form(
    attend: Attend,
    spatial: tuple[Tensor, Tensor, Tensor],
    temporal: tuple[Tensor, Tensor, Tensor],
    gate: Tensor,
    *,
    mask: FrameMask = FrameMask(),
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: tuple[QKNorm | None, QKNorm | None] = (None, None),
    rope: tuple[Rope | None, Rope | None] = (None, None),
) -> Tensor:
    common: dict[str, Any] = {"scale": scale, "lengths": lengths, "q_start": 0}
    a = video_form(attend, *spatial, mask=FrameMask.same_frame(), norm=norm[0], rope=rope[0], **common)
    b = temporal_form(attend, *temporal, mask=mask, norm=norm[1], rope=rope[1], **common)
    return (gate * a + (1 - gate) * b).to(a.dtype)


# ---- How it may be called ----


def _gated_allows(c: Choice) -> bool:
    temporal_heads = c["temporal_heads"] if c["tensors"] == "apart" else c["heads"]
    if c["rope"] and c["rope"][2] and c["heads"] == "grouped":
        return False
    return not (c["temporal_rope"] and c["temporal_rope"][2] and temporal_heads == "grouped")


def _gate(d: Draw, given: str, n: Sizes) -> Tensor:
    shapes = {
        "scalar": (),
        "head": (n.H, 1),
        "channel": (n.D,),
        "token": (n.S, 1, 1),
        "frame": (n.T, 1, 1, 1),
        "sample, float32": (n.B, 1, 1, 1, 1),
        "all": (n.B, n.T, n.S, n.H, n.D),
    }
    return d("gate", *shapes[given], around=0.5, spread=0.2, dtype=torch.float32 if "float32" in given else None)


@space(
    "gated_attention",
    _gated_allows,
    tensors=("apart", "shared"),
    heads=("equal", "grouped"),
    temporal_heads=("equal", "grouped"),
    gate=("scalar", "head", "channel", "token", "frame", "sample, float32", "all"),
    mask=MASKS,
    lengths=(None, "some", "beyond"),
    scale=(None, 0.3),
    **NORM_ROPE,
    temporal_norm=NORMS,
    temporal_rope=ROPES,
)
def _gated(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    same = {**c, "keys": "same"}
    spatial, _, G = draw_qkv(d, same, n)
    temporal = spatial
    G_t = G
    if c["tensors"] == "apart":
        temporal, _, G_t = draw_qkv(d, {**same, "heads": c["temporal_heads"]}, n, "temporal_")
    return {
        "spatial": tuple(spatial.values()),
        "temporal": tuple(temporal.values()),
        "gate": _gate(d, c["gate"], n),
        "mask": draw_mask(c["mask"], n.T),
        "lengths": draw_lengths(d, c["lengths"], (n.B,), n.T),
        "scale": c["scale"],
        "norm": (draw_norm(d, c["norm"], n.H, G, n.D), draw_norm(d, c["temporal_norm"], n.H, G_t, n.D, "temporal_")),
        "rope": (
            draw_rope(d, c["rope"], n.T, n.S, n.H, n.D),
            draw_rope(d, c["temporal_rope"], n.T, n.S, n.H, n.D, "temporal_"),
        ),
    }


FORMS = {
    "gated_attention": with_each(_gated_form),
}
