"""Cases of spatial and video attention, and PyTorch's forms of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
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
from vdcore.ops.cases import Attend, case, dense, norm_rope, token_mask, unpack, with_each
from vdcore.ops.check import check_grid_mask
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


# Windows in frames, rows and columns of a grid of 3 x 5 tokens, which tiles need not divide.
GRIDS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "neighborhood": lambda d: {**d.qkv(2, 4, 15, 2, 40), "mask": GridMask.neighborhood((3, 3, 3))},
    "causal neighborhood against a cache": lambda d: {
        **d.qkv(1, 2, 15, 2, 16, T_k=5),
        "mask": GridMask.neighborhood((3, 1, 3), causal=True),
        "return_lse": True,
    },
    "sliding tiles": lambda d: {**d.qkv(1, 5, 15, 2, 24), "mask": GridMask.tiles((1, 3, 1), (2, 1, 2))},
    "radial, lengths": lambda d: {
        **d.qkv(2, 6, 15, 2, 16),
        "mask": GridMask.radial(3, 5),
        "lengths": d.integers(6, 3),
    },
    "window, text, grouped heads, norm and rope": lambda d: {
        **d.qkv(2, 4, 15, 4, 24, G=2),
        "mask": GridMask.window(2, 0, (1, 1, 0), 1),
        "text": (d("text_q", 2, 6, 4, 24), d("text_k", 2, 6, 2, 24), d("text_v", 2, 6, 2, 24)),
        "text_lengths": d.integers(4, 0),
        "text_norm": d.norm(4, 2, 24, prefix="text_"),
        "text_first": True,
        "lengths": d.integers(3, 4),
        "norm": d.norm(4, 2, 24, over="all"),
        "rope": d.rope(4, 15, 12),
        "return_lse": True,
    },
    "teacher forcing on a grid": lambda d: {
        **d.qkv(1, 6, 15, 2, 16),
        "mask": GridMask(FrameMask.teacher_forcing(3), (2, 1, 0), 1),
    },
    "masks of heads, packed": lambda d: {
        "q": d("q", 1, 4, 15, 3, 4, 16),
        "mask": ((1, GridMask.window(1, 1, 1, 2)), (2, FrameMask.causal()), (1, GridMask(columns=1, sink=1))),
        "q_start": 1,
    },
}
for _name, _build in GRIDS.items():
    case("video_attention", _name, "windows", *(("layout",) if "packed" in _name else ()))(
        lambda d, _build=_build: {**_build(d), "grid": (3, 5)}
    )


def video_form(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Any = FrameMask(),
    grid: tuple[int, int] | None = None,
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
    if not isinstance(mask, HeadMasks):
        mask = check_grid_mask("video_attention", mask, grid, S, q.shape[3], k.shape[3])
    seen = token_mask(mask, T, T_k, S, start, lengths, q.device)
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
        alive, live_rows = (x[:, None, :, None] for x in (alive, live))
        among_video = alive & valid[:, None, None] if seen is None else alive & seen
        of_video = torch.cat((among_video, (alive & live[:, None, None]).expand(-1, among_video.shape[1], -1, -1)), 3)
        of_text = torch.cat((valid if text_sees == "all" else torch.zeros_like(valid), live), 1)
        to_text = (live_rows & of_text[:, None, None]).expand(-1, of_video.shape[1], -1, -1)
        seen = torch.cat((of_video, to_text), 2)
    out, lse = dense(attend, q, k, v, seen, scale, return_lse)

    def split(x: Tensor) -> Any:
        if text is None:
            return x.unflatten(1, (T, S))
        return x[:, : T * S].unflatten(1, (T, S)), x[:, T * S :]

    return (split(out), split(lse)) if lse is not None else split(out)


# ---- How it may be called ----


WINDOWS = (
    GridMask.neighborhood((3, 3, 3)),
    GridMask.neighborhood((3, 3, 1), causal=True),
    GridMask.tiles((1, 3, 3), (2, 2, 1)),
    GridMask.radial(3, 3),
    GridMask(FrameMask(past=1, sink=1), (2, 1, 0), None, (1, 1, 2), sink=1),
    "masks of heads",
)


def grid_of(S: int) -> tuple[int, int]:
    rows = max(n for n in range(1, S + 1) if S % n == 0 and n * n <= S)
    return rows, S // rows


@space(
    "video_attention",
    heads_allow,
    **{**FRAMES, "mask": (*FRAMES["mask"], *WINDOWS)},
    text=(None, "given"),
    text_lengths=(None, "some", "beyond"),
    text_norm=(None, ("rms", "head", "qk", False), ("layer", "all", "qk+", True)),
    text_first=(False, True),
    text_sees=("all", "text"),
)
def _video(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    args = draw_frames(d, c, n)
    G = args["k"].shape[3] if "k" in args else n.H
    if c["mask"] == "masks of heads":
        args["mask"] = tuple((n.H // G, WINDOWS[g % 5] if g % 3 else FrameMask.causal()) for g in range(G))
    if not isinstance(c["mask"], FrameMask):
        args["grid"] = grid_of(n.S)
    if c["text"] is None:
        return args
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
