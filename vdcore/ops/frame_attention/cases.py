"""Cases of spatial and video attention, and PyTorch's forms of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.alternatives import (
    NORM_ROPE,
    Choice,
    Sizes,
    draw_lengths,
    draw_norm,
    draw_qkv,
    draw_rope,
    heads_allow,
    space,
)
from vdcore.ops.cases import Attend, case, dense, frame_mask, norm_rope, unpack, with_each
from vdcore.ops.temporal_attention.cases import FRAME_ARGUMENTS, FRAMES, draw_frames
from vdcore.rope import Rope, axial_rope

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw


for _name, (_build, _tags) in FRAME_ARGUMENTS.items():
    case("video_attention", _name, *_tags)(_build)


@case("spatial_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return d.qkv(2, 3, 17, 3, 40)


@case("spatial_attention", "packed", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"q": d("q", 1, 2, 33, 3, 2, 72), "return_lse": True}


@case("spatial_attention", "norm and axial rope", "norm_rope")
def _(d: Draw) -> dict[str, Any]:
    table = axial_rope((2, 3, 5), (4, 6, 6))
    rope = Rope(d.leaf("cos", table.cos, torch.float32), d.leaf("sin", table.sin, torch.float32))
    return {**d.qkv(1, 2, 15, 4, 24, G=2), "norm": d.norm(4, 2, 24, over="all"), "rope": rope, "scale": 0.4}


@case("spatial_attention", "tokens beyond a tile", "long")
def _(d: Draw) -> dict[str, Any]:
    return d.qkv(1, 2, 203, 2, 64)


def _spatial_form(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = unpack(q, k, v)
    B, T = q.shape[:2]
    q, k = norm_rope(q, k, norm, rope, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = dense(attend, q, k, v, None, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)
    out = out.unflatten(0, (B, T))
    return (out, lse.unflatten(0, (B, T))) if lse is not None else out


@case("video_attention", "text", "layout", "masked")
def _(d: Draw) -> dict[str, Any]:
    text = tuple(d(f"text_{x}", 2, 5, 2, 16) for x in "qkv")
    return {**d.qkv(2, 3, 7, 2, 16), "text": text, "mask": FrameMask.window(1), "return_lse": True}


@case("video_attention", "causal text", "masked", "norm_rope")
def _(d: Draw) -> dict[str, Any]:
    text = (d("text_q", 2, 6, 4, 24), d("text_k", 2, 6, 2, 24), d("text_v", 2, 6, 2, 24))
    return {
        **d.qkv(2, 4, 5, 4, 24, G=2),
        "text": text,
        "text_lengths": d.integers(4, 0),
        "text_norm": d.norm(4, 2, 24, prefix="text_"),
        "text_first": True,
        "text_sees": "text",
        "lengths": d.integers(3, 4),
        "norm": d.norm(4, 2, 24),
        "rope": d.rope(4, 5, 12),
        "mask": FrameMask.causal(),
    }


@case("video_attention", "same frame", "masked")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 3, 37, 2, 64), "mask": FrameMask.same_frame()}


@case("video_attention", "tokens beyond a tile", "masked", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**d.qkv(1, 4, 83, 1, 40), "mask": FrameMask(past=1, future=0, sink=1)}


@case("video_attention", "teacher forcing and text", "masked")
def _(d: Draw) -> dict[str, Any]:
    text = tuple(d(f"text_{x}", 1, 5, 1, 16) for x in "qkv")
    mask = FrameMask.teacher_forcing(4, 2)
    return {**d.qkv(1, 8, 35, 1, 16), "text": text, "text_sees": "text", "mask": mask, "return_lse": True}


def video_form(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    text_lengths: Tensor | None = None,
    text_norm: QKNorm | None = None,
    text_first: bool = False,
    text_sees: str = "all",
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = unpack(q, k, v)
    B, T, S, _, D = q.shape
    T_k = k.shape[1]
    start = max(T_k - T, 0) if q_start is None else q_start
    scale = D**-0.5 if scale is None else scale
    q, k = norm_rope(q, k, norm, rope, start)
    frames = frame_mask(mask, T, T_k, start, lengths, q.device)
    seen = None if frames is None else frames.repeat_interleave(S, 1).repeat_interleave(S, 2)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    if text is not None:
        L = text[0].shape[1]
        tq, tk = norm_rope(text[0], text[1], text_norm, None, 0)
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), (tq, tk, text[2])))
        alive, valid, live = (torch.ones(B, n, dtype=torch.bool, device=q.device) for n in (T * S, T_k * S, L))
        if lengths is not None:
            alive, valid = (
                (torch.arange(first, last, device=q.device) < lengths[:, None]).repeat_interleave(S, 1)
                for first, last in ((start, start + T), (0, T_k))
            )
        if text_lengths is not None:
            live = torch.arange(L, device=q.device) < text_lengths[:, None]
        among_video = alive[..., None] & valid[:, None] if seen is None else alive[..., None] & seen
        of_video = torch.cat((among_video, alive[..., None] & live[:, None]), 2)
        of_text = torch.cat((valid if text_sees == "all" else torch.zeros_like(valid), live), 1)
        seen = torch.cat((of_video, live[..., None] & of_text[:, None]), 1)
    out, lse = dense(attend, q, k, v, None if seen is None else seen[:, None], scale, return_lse)

    def split(x: Tensor) -> Any:
        if text is None:
            return x.unflatten(1, (T, S))
        return x[:, : T * S].unflatten(1, (T, S)), x[:, T * S :]

    return (split(out), split(lse)) if lse is not None else split(out)


# ---- How it may be called ----


@space(
    "video_attention",
    heads_allow,
    **FRAMES,
    text=(None, "given"),
    text_lengths=(None, "some", "beyond"),
    text_norm=(None, ("rms", "head", "qk", False), ("layer", "all", "qk+", True)),
    text_first=(False, True),
    text_sees=("all", "text"),
)
def _video(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    args = draw_frames(d, c, n)
    if c["text"] is None:
        return args
    G = args["k"].shape[3] if "k" in args else n.H
    heads = {"q": n.H, "k": G, "v": G}
    return {
        **args,
        "text": tuple(d(f"text_{name}", n.B, n.L, h, n.D) for name, h in heads.items()),
        "text_lengths": draw_lengths(d, c["text_lengths"], (n.B,), n.L),
        "text_norm": draw_norm(d, c["text_norm"], n.H, G, n.D, "text_"),
        "text_first": c["text_first"],
        "text_sees": c["text_sees"],
    }


@space(
    "spatial_attention",
    heads_allow,
    keys=("same", "packed"),
    heads=("equal", "grouped"),
    scale=(None, 0.3, -0.2),
    **NORM_ROPE,
    return_lse=(False, True),
)
def _spatial(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, _, G = draw_qkv(d, c, n)
    norm, rope = draw_norm(d, c["norm"], n.H, G, n.D), draw_rope(d, c["rope"], n.T, n.S, n.H, n.D)
    return {**tensors, "scale": c["scale"], "norm": norm, "rope": rope, "return_lse": c["return_lse"]}


FORMS = {
    "spatial_attention": with_each(_spatial_form),
    "video_attention": with_each(video_form),
}
