"""Temporal attention's cases, and PyTorch's form of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.alternatives import (
    MASKS,
    NORMS,
    ROPES,
    Choice,
    Sizes,
    draw_lengths,
    draw_mask,
    draw_norm,
    draw_qkv,
    draw_rope,
    heads_allow,
    space,
)
from vdcore.ops.cases import Attend, case, dense, frame_mask, norm_rope, unpack, with_each
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


# Of video attention too.
FRAME_ARGUMENTS: dict[str, tuple[Callable[[Draw], dict[str, Any]], tuple[str, ...]]] = {
    "plain": (lambda d: d.qkv(2, 5, 7, 3, 40), ("plain", "layout")),
    "window and sink": (
        lambda d: {**d.qkv(1, 19, 3, 2, 16), "mask": FrameMask(past=4, future=1, sink=2)},
        ("layout", "masked"),
    ),
    "causal": (lambda d: {**d.qkv(2, 9, 3, 2, 24), "mask": FrameMask.causal()}, ("masked",)),
    "chunks": (
        lambda d: {**d.qkv(1, 11, 2, 2, 8), "mask": FrameMask(past=1, future=0, chunk=3, sink=1)},
        ("masked",),
    ),
    "new frames against a cache": (
        lambda d: {**d.qkv(2, 3, 4, 2, 32, T_k=8), "mask": FrameMask.window(4), "return_lse": True},
        ("masked",),
    ),
    "q_start": (
        lambda d: {**d.qkv(1, 6, 3, 2, 16, T_k=5), "mask": FrameMask(past=2, future=0), "q_start": 3},
        ("masked",),
    ),
    "shots": (
        lambda d: {**d.qkv(1, 17, 3, 2, 24), "mask": FrameMask(past=2, future=1, shots=(0, 4, 5, 12))},
        ("layout", "masked"),
    ),
    "shots of chunks, new frames against a cache": (
        lambda d: {
            **d.qkv(1, 4, 3, 2, 16, T_k=9),
            "mask": FrameMask(past=1, future=0, chunk=2, shots=(1, 3)),
            "return_lse": True,
        },
        ("masked",),
    ),
    "teacher forcing": (
        lambda d: {**d.qkv(1, 18, 3, 2, 24), "mask": FrameMask.teacher_forcing(9, 2), "return_lse": True},
        ("layout", "masked"),
    ),
    "teacher forcing in a window, norm, rope, lengths": (
        lambda d: {
            **d.qkv(2, 8, 3, 2, 24, G=1),
            "mask": FrameMask.teacher_forcing(4, 1, past=2),
            "norm": d.norm(2, 1, 24),
            "rope": d.rope(8, 1, 8),
            "lengths": d.integers(8, 6),
        },
        ("masked", "norm_rope"),
    ),
    "noisy frames of teacher forcing alone": (
        lambda d: {**d.qkv(1, 6, 3, 2, 16, T_k=12), "mask": FrameMask.teacher_forcing(6, 3, past=1)},
        ("masked",),
    ),
    "lengths": (
        lambda d: {
            **d.qkv(3, 6, 3, 2, 20),
            "lengths": d.integers(6, 2, 0),
            "mask": FrameMask.causal(),
            "return_lse": True,
        },
        ("layout", "masked"),
    ),
    "grouped heads": (lambda d: {**d.qkv(1, 6, 3, 6, 16, G=2), "mask": FrameMask.symmetric(2)}, ("layout",)),
    "packed": (lambda d: {"q": d("q", 2, 5, 3, 3, 4, 24), "return_lse": True}, ("layout",)),
    "norm and rope": (
        lambda d: {
            **d.qkv(2, 6, 3, 3, 24),
            "norm": d.norm(3, 3, 24),
            "rope": d.rope(6, 1, 8),
            "mask": FrameMask.window(2),
        },
        ("layout", "norm_rope"),
    ),
    "layer norm over all heads, half rope per token": (
        lambda d: {
            **d.qkv(2, 4, 5, 4, 24, G=2),
            "norm": d.norm(4, 2, 24, "layer", "all"),
            "rope": d.rope(4, 5, 12, style="half"),
        },
        ("norm_rope",),
    ),
    "rope per head, lengths": (
        lambda d: {
            **d.qkv(2, 5, 3, 3, 18),
            "rope": d.rope(7, 3, 3, 9),
            "norm": d.norm(3, 3, 18, "layer", dtype=torch.float32),
            "lengths": d.integers(4, 5),
            "return_lse": True,
        },
        ("norm_rope",),
    ),
    "one rope for all frames": (
        lambda d: {**d.qkv(1, 4, 6, 2, 16), "rope": d.rope(1, 6, 8), "scale": 0.3},
        ("norm_rope",),
    ),
}


for _name, (_build, _tags) in FRAME_ARGUMENTS.items():
    case("temporal_attention", _name, *_tags)(_build)


@case("temporal_attention", "bias", "layout", "bias")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(2, 5, 7, 3, 24), "bias": d("bias", 3, 5, 5, spread=0.7), "return_lse": True}


@case("temporal_attention", "bias for all heads, window, lengths", "masked", "bias")
def _(d: Draw) -> dict[str, Any]:
    bias = d("bias", 1, 6, 9, spread=0.7, dtype=torch.float32)
    more = {"mask": FrameMask(past=3, future=1, sink=1), "lengths": d.integers(9, 5, 0), "bias": bias}
    return {**d.qkv(3, 6, 3, 4, 20, T_k=9, G=2), **more, "norm": d.norm(4, 2, 20), "rope": d.rope(9, 1, 8)}


@case("temporal_attention", "long, bias", "long", "bias")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 150, 2, 2, 40), "bias": d("bias", 2, 150, 150), "mask": FrameMask(past=70, future=3, sink=5)}


@case("temporal_attention", "long", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 150, 2, 2, 72), "mask": FrameMask(past=70, future=3, sink=5)}


@case("temporal_attention", "long, teacher forcing", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 160, 1, 2, 40), "mask": FrameMask.teacher_forcing(80, 3, past=12)}


@case("temporal_attention", "long, shots", "long")
def _(d: Draw) -> dict[str, Any]:
    shots = (3, 30, 31, 75, 110)
    return {**d.qkv(1, 110, 1, 1, 40, T_k=140), "mask": FrameMask(past=20, future=0, shots=shots), "q_start": 25}


@case("temporal_attention", "long and dense", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 140, 1, 2, 111, T_k=300), "return_lse": True}


def temporal_form(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = unpack(q, k, v)
    B, T, S, _, D = q.shape
    T_k = k.shape[1]
    start = max(T_k - T, 0) if q_start is None else q_start
    q, k = norm_rope(q, k, norm, rope, start)
    seen = frame_mask(mask, T, T_k, start, lengths, q.device)
    if seen is not None:
        seen = seen[:, None, None].expand(B, S, 1, T, T_k).flatten(0, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*S, T, heads, D)
    out, lse = dense(attend, q, k, v, seen, D**-0.5 if scale is None else scale, return_lse, bias)
    out = out.unflatten(0, (B, S)).transpose(1, 2)
    return (out, lse.unflatten(0, (B, S)).transpose(1, 2)) if lse is not None else out


# ---- How it may be called ----


FRAMES: dict[str, tuple[Any, ...]] = {
    "keys": ("same", "more", "fewer", "packed"),
    "heads": ("equal", "grouped"),
    "mask": MASKS,
    "q_start": (None, 0, 2),
    "lengths": (None, "some", "beyond", "int32"),
    "scale": (None, 0.3, -0.2),
    "norm": NORMS,
    "rope": ROPES,
    "return_lse": (False, True),
    # Filled in by vdcore.testing; drawn before what video attention has beyond these.
    **dict.fromkeys(("values", "dtype", "layout"), ()),
}


@space(
    "temporal_attention",
    heads_allow,
    **FRAMES,
    bias=(None, "heads", "shared", "float32"),
)
def draw_frames(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, T_k, G = draw_qkv(d, c, n)
    start = max(T_k - n.T, 0) if c["q_start"] is None else c["q_start"]
    return {
        **tensors,
        "mask": draw_mask(c["mask"], max(T_k, start + n.T)),
        "q_start": c["q_start"],
        "lengths": draw_lengths(d, c["lengths"], (n.B,), T_k),
        "scale": c["scale"],
        "norm": draw_norm(d, c["norm"], n.H, G, n.D),
        "rope": draw_rope(d, c["rope"], max(T_k, start + n.T), n.S, n.H, n.D),
        "return_lse": c["return_lse"],
        **_draw_bias(d, c.get("bias"), n, T_k),
    }


def _draw_bias(d: Draw, given: str | None, n: Sizes, T_k: int) -> dict[str, Tensor]:
    if given is None:
        return {}
    dtype = torch.float32 if given == "float32" else None
    return {"bias": d("bias", 1 if given == "shared" else n.H, n.T, T_k, spread=0.7, dtype=dtype)}


FORMS = {
    "temporal_attention": with_each(temporal_form),
}
