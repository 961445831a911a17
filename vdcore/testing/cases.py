"""Cases of every operator: odd shapes, and every argument at least once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope, axial_rope
from vdcore.testing.layouts import lay_out


@dataclass
class Inputs:
    """Arguments of one call.

    Args:
        args: keyword arguments of the public function.
        leaves: the floating tensors among them, by name.
    """

    args: dict[str, Any]
    leaves: dict[str, Tensor]


# What values look like: attention's gradients, for one, err otherwise where inputs have a mean.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of standard normal values
    "normal": lambda x: x,
    "positive": lambda x: x.erf() / 2 + 0.5,
    "with a mean": lambda x: x + 3,
    "large": lambda x: 2 * x,
    "small": lambda x: 1e-3 * x,
    "outliers": lambda x: torch.where(x.abs() > 2, 2 * x, x),
}


class Draw:
    """Draws the tensors of a case: values rounded to the case's dtype, whatever dtype they are then stored in."""

    def __init__(
        self,
        dtype: torch.dtype,
        stored: torch.dtype,
        device: str,
        layout: str,
        seed: int,
        requires_grad: bool,
        values: str = "normal",
    ) -> None:
        self.dtype, self.stored, self.device, self.layout = dtype, stored, device, layout
        self.requires_grad, self.distribution = requires_grad, DISTRIBUTIONS[values]
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.leaves: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, around: float = 0.0, spread: float = 1.0, dtype: Any = None) -> Tensor:
        """A random tensor, a leaf of the call. ``dtype``: float32 beside a half-precision case.

        Tensors of spread 1 around 0 follow the case's distribution; all others, weights and gates, are normal.
        """
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        plain = spread == 1 and around == 0
        return self.leaf(name, self.distribution(values) if plain else values * spread + around, dtype)

    def leaf(self, name: str, values: Tensor, dtype: Any = None) -> Tensor:
        rounded = values.to(dtype or self.dtype)
        stored = self.stored if self.stored == torch.float64 else dtype or self.stored
        x = lay_out(rounded.to(stored).to(self.device), self.layout).requires_grad_(self.requires_grad)
        self.leaves[name] = x
        return x

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)


@dataclass(frozen=True)
class Case:
    """One way to call one operator.

    Args:
        op: the public function.
        name: what the case is about.
        build: makes the keyword arguments with a :class:`Draw`.
        tags: what tests select by.
        values: of :data:`DISTRIBUTIONS`.
    """

    op: str
    name: str
    build: Callable[[Draw], dict[str, Any]]
    tags: frozenset[str] = field(default_factory=frozenset)
    values: str = "normal"

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        stored: torch.dtype | None = None,
        device: str = "cpu",
        layout: str = "contiguous",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> Inputs:
        """The arguments, with values that ``dtype`` can hold, stored in ``stored`` (default: the same)."""
        draw = Draw(dtype, stored or dtype, device, layout, seed, requires_grad, self.values)
        args = self.build(draw)
        return Inputs(args, draw.leaves)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}".replace(" ", "_")


CASES: list[Case] = []


def cases_of(*ops: str, tag: str | None = None) -> list[Case]:
    """Cases of the named operators, or of all, that carry the tag."""
    return [c for c in CASES if (not ops or c.op in ops) and (tag is None or tag in c.tags)]


def _add(op: str, name: str, *tags: str) -> Callable[[Callable[[Draw], dict[str, Any]]], Any]:
    def keep(build: Callable[[Draw], dict[str, Any]]) -> Any:
        CASES.append(Case(op, name, build, frozenset(tags)))
        return build

    return keep


def _qkv(
    d: Draw, B: int, T: int, S: int, H: int, D: int, T_k: int = 0, G: int = 0, prefix: str = ""
) -> dict[str, Tensor]:
    T_k, G = T_k or T, G or H
    return {
        "q": d(prefix + "q", B, T, S, H, D),
        "k": d(prefix + "k", B, T_k, S, G, D),
        "v": d(prefix + "v", B, T_k, S, G, D),
    }


def _norm(
    d: Draw, H: int, G: int, D: int, kind: str = "rms", over: str = "head", prefix: str = "", **kw: Any
) -> QKNorm:
    q, k = (D, D) if over == "head" else (H * D, G * D)
    weights = [d(prefix + name, n, around=1.0, spread=0.3, **kw) for name, n in (("q_weight", q), ("k_weight", k))]
    biases: list[Tensor | None] = [None, None]
    if kind == "layer":
        biases = [d(prefix + name, n, spread=0.3, **kw) for name, n in (("q_bias", q), ("k_bias", k))]
    return QKNorm(weights[0], weights[1], kind, over, 1e-5, biases[0], biases[1])  # type: ignore[arg-type]


def _rope(d: Draw, *shape: int, style: str = "interleaved", prefix: str = "", dtype: Any = None) -> Rope:
    angle = torch.randn(shape, generator=d.generator, dtype=torch.float64, device="cpu")
    cos, sin = d.leaf(prefix + "cos", angle.cos(), dtype), d.leaf(prefix + "sin", angle.sin(), dtype)
    return Rope(cos, sin, style)  # type: ignore[arg-type]


# ---- Temporal attention, and the same arguments for video attention ----

FRAME_ARGUMENTS: dict[str, tuple[Callable[[Draw], dict[str, Any]], tuple[str, ...]]] = {
    "plain": (lambda d: _qkv(d, 2, 5, 7, 3, 40), ("plain", "layout")),
    "window and sink": (
        lambda d: {**_qkv(d, 1, 19, 3, 2, 16), "mask": FrameMask(past=4, future=1, sink=2)},
        ("layout", "masked"),
    ),
    "causal": (lambda d: {**_qkv(d, 2, 9, 3, 2, 24), "mask": FrameMask.causal()}, ("masked",)),
    "chunks": (
        lambda d: {**_qkv(d, 1, 11, 2, 2, 8), "mask": FrameMask(past=1, future=0, chunk=3, sink=1)},
        ("masked",),
    ),
    "new frames against a cache": (
        lambda d: {**_qkv(d, 2, 3, 4, 2, 32, T_k=8), "mask": FrameMask.window(4), "return_lse": True},
        ("masked",),
    ),
    "q_start": (
        lambda d: {**_qkv(d, 1, 6, 3, 2, 16, T_k=5), "mask": FrameMask(past=2, future=0), "q_start": 3},
        ("masked",),
    ),
    "lengths": (
        lambda d: {
            **_qkv(d, 3, 6, 3, 2, 20),
            "lengths": d.integers(6, 2, 0),
            "mask": FrameMask.causal(),
            "return_lse": True,
        },
        ("layout", "masked"),
    ),
    "grouped heads": (lambda d: {**_qkv(d, 1, 6, 3, 6, 16, G=2), "mask": FrameMask.symmetric(2)}, ("layout",)),
    "packed": (lambda d: {"q": d("q", 2, 5, 3, 3, 4, 24), "return_lse": True}, ("layout",)),
    "norm and rope": (
        lambda d: {
            **_qkv(d, 2, 6, 3, 3, 24),
            "norm": _norm(d, 3, 3, 24),
            "rope": _rope(d, 6, 1, 8),
            "mask": FrameMask.window(2),
        },
        ("layout", "norm_rope"),
    ),
    "layer norm over all heads, half rope per token": (
        lambda d: {
            **_qkv(d, 2, 4, 5, 4, 24, G=2),
            "norm": _norm(d, 4, 2, 24, "layer", "all"),
            "rope": _rope(d, 4, 5, 12, style="half"),
        },
        ("norm_rope",),
    ),
    "rope per head, lengths": (
        lambda d: {
            **_qkv(d, 2, 5, 3, 3, 18),
            "rope": _rope(d, 7, 3, 3, 9),
            "norm": _norm(d, 3, 3, 18, "layer", dtype=torch.float32),
            "lengths": d.integers(4, 5),
            "return_lse": True,
        },
        ("norm_rope",),
    ),
    "one rope for all frames": (
        lambda d: {**_qkv(d, 1, 4, 6, 2, 16), "rope": _rope(d, 1, 6, 8), "scale": 0.3},
        ("norm_rope",),
    ),
}

for _name, (_build, _tags) in FRAME_ARGUMENTS.items():
    for _op in ("temporal_attention", "video_attention"):
        CASES.append(Case(_op, _name, _build, frozenset(_tags)))


@_add("temporal_attention", "long", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**_qkv(d, 1, 150, 2, 2, 72), "mask": FrameMask(past=70, future=3, sink=5)}


@_add("temporal_attention", "long and dense", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**_qkv(d, 1, 140, 1, 2, 111, T_k=300), "return_lse": True}


# ---- Video attention with text, spatial attention ----


@_add("video_attention", "text", "layout", "masked")
def _(d: Draw) -> dict[str, Any]:
    text = tuple(d(f"text_{x}", 2, 5, 2, 16) for x in "qkv")
    return {**_qkv(d, 2, 3, 7, 2, 16), "text": text, "mask": FrameMask.window(1), "return_lse": True}


@_add("video_attention", "causal text", "masked", "norm_rope")
def _(d: Draw) -> dict[str, Any]:
    text = (d("text_q", 2, 6, 4, 24), d("text_k", 2, 6, 2, 24), d("text_v", 2, 6, 2, 24))
    return {
        **_qkv(d, 2, 4, 5, 4, 24, G=2),
        "text": text,
        "text_lengths": d.integers(4, 0),
        "text_norm": _norm(d, 4, 2, 24, prefix="text_"),
        "text_first": True,
        "text_sees": "text",
        "lengths": d.integers(3, 4),
        "norm": _norm(d, 4, 2, 24),
        "rope": _rope(d, 4, 5, 12),
        "mask": FrameMask.causal(),
    }


@_add("video_attention", "same frame", "masked")
def _(d: Draw) -> dict[str, Any]:
    return {**_qkv(d, 1, 3, 37, 2, 64), "mask": FrameMask.same_frame()}


@_add("video_attention", "tokens beyond a tile", "masked", "long")
def _(d: Draw) -> dict[str, Any]:
    return {**_qkv(d, 1, 4, 83, 1, 40), "mask": FrameMask(past=1, future=0, sink=1)}


@_add("spatial_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return _qkv(d, 2, 3, 17, 3, 40)


@_add("spatial_attention", "packed", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"q": d("q", 1, 2, 33, 3, 2, 72), "return_lse": True}


@_add("spatial_attention", "norm and axial rope", "norm_rope")
def _(d: Draw) -> dict[str, Any]:
    table = axial_rope((2, 3, 5), (4, 6, 6))
    rope = Rope(d.leaf("cos", table.cos, torch.float32), d.leaf("sin", table.sin, torch.float32))
    return {**_qkv(d, 1, 2, 15, 4, 24, G=2), "norm": _norm(d, 4, 2, 24, over="all"), "rope": rope, "scale": 0.4}


@_add("spatial_attention", "tokens beyond a tile", "long")
def _(d: Draw) -> dict[str, Any]:
    return _qkv(d, 1, 2, 203, 2, 64)


# ---- Gated attention ----


@_add("gated_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    spatial, temporal = (tuple(_qkv(d, 2, 4, 9, 2, 24, prefix=p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 2, 1, 9, 2, 1, around=0.5, spread=0.2)}


@_add("gated_attention", "shared tensors, scalar gate")
def _(d: Draw) -> dict[str, Any]:
    qkv = tuple(_qkv(d, 1, 5, 6, 3, 16).values())
    return {"spatial": qkv, "temporal": qkv, "gate": d.leaf("gate", torch.tensor(0.3)), "mask": FrameMask.causal()}


@_add("gated_attention", "norm, rope, lengths", "norm_rope", "masked")
def _(d: Draw) -> dict[str, Any]:
    spatial = tuple(_qkv(d, 2, 4, 5, 4, 16, G=2).values())
    temporal = tuple(_qkv(d, 2, 4, 5, 4, 16, prefix="temporal_").values())
    return {
        "spatial": spatial,
        "temporal": temporal,
        "gate": d("gate", 16, around=0.5, spread=0.2, dtype=torch.float32),
        "norm": (_norm(d, 4, 2, 16), _norm(d, 4, 4, 16, "layer", "all", prefix="temporal_")),
        "rope": (_rope(d, 1, 5, 8), _rope(d, 4, 1, 8, style="half", prefix="temporal_")),
        "lengths": d.integers(3, 4),
        "mask": FrameMask.window(1),
    }


@_add("gated_attention", "gate of full size", "layout")
def _(d: Draw) -> dict[str, Any]:
    spatial, temporal = (tuple(_qkv(d, 1, 3, 7, 2, 16, prefix=p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 1, 3, 7, 2, 16, around=0.5, spread=0.2)}


# ---- Cross attention ----


@_add("cross_attention", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"q": d("q", 2, 3, 5, 2, 40), "k": d("k", 2, 11, 2, 40), "v": d("v", 2, 11, 2, 40)}


@_add("cross_attention", "lengths", "masked")
def _(d: Draw) -> dict[str, Any]:
    q, k, v = d("q", 3, 2, 5, 4, 16), d("k", 3, 9, 2, 16), d("v", 3, 9, 2, 16)
    return {"q": q, "k": k, "v": v, "lengths": d.integers(9, 4, 0), "return_lse": True}


@_add("cross_attention", "a prompt per frame", "masked", "norm_rope", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k, v = d("q", 2, 3, 4, 2, 24), d("k", 2, 3, 6, 2, 24), d("v", 2, 3, 6, 2, 24)
    return {
        **{"q": q, "k": k, "v": v, "norm": _norm(d, 2, 2, 24, over="all"), "scale": 0.5},
        "lengths": d.integers(6, 1, 0, 3, 5, 2).reshape(2, 3),
    }


# ---- Norm and rope ----


@_add("qk_norm_rope", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 4, 5, 3, 40), d("k", 2, 4, 5, 3, 40)
    return {"q": q, "k": k, "norm": _norm(d, 3, 3, 40), "rope": _rope(d, 4, 5, 20)}


@_add("qk_norm_rope", "layer norm over all heads, half, grouped")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 3, 4, 4, 18), d("k", 2, 3, 4, 2, 18)
    norm = _norm(d, 4, 2, 18, "layer", "all", dtype=torch.float32)
    return {"q": q, "k": k, "norm": norm, "rope": _rope(d, 8, 1, 6, style="half"), "frame_start": 5}


@_add("qk_norm_rope", "per head, no weights")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 1, 3, 7, 2, 32), d("k", 1, 3, 7, 2, 32)
    return {"q": q, "k": k, "norm": QKNorm(None, None, "layer"), "rope": _rope(d, 3, 7, 2, 16, dtype=torch.float32)}


@_add("qk_norm_rope", "rms over all heads, one rope for all frames", "layout")
def _(d: Draw) -> dict[str, Any]:
    q, k = d("q", 2, 2, 6, 3, 20), d("k", 2, 2, 6, 3, 20)
    return {"q": q, "k": k, "norm": _norm(d, 3, 3, 20, over="all"), "rope": _rope(d, 1, 6, 10)}


# ---- Patches ----


@_add("patchify", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 40, 4, 1, 2, 2, spread=0.25)
    return {"video": d("video", 2, 4, 3, 6, 10), "weight": weight, "bias": d("bias", 40)}


@_add("patchify", "3D patches, no bias", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"video": d("video", 1, 3, 4, 6, 9), "weight": d("weight", 17, 3, 2, 2, 3, spread=0.2)}


@_add("patchify", "one token a pixel")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 24, 16, 1, 1, 1, spread=0.25)
    return {"video": d("video", 2, 16, 2, 5, 7), "weight": weight, "bias": d("bias", 24, dtype=torch.float32)}


@_add("unpatchify", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 4 * 4, 40, spread=0.15)
    return {
        **{"tokens": d("tokens", 2, 3, 15, 40), "weight": weight, "bias": d("bias", 16)},
        **{"channels": 4, "patch": (1, 2, 2), "grid": (3, 3, 5)},
    }


@_add("unpatchify", "3D patches, channels first", "layout")
def _(d: Draw) -> dict[str, Any]:
    weight = d("weight", 3 * 12, 17, spread=0.25)
    return {
        **{"tokens": d("tokens", 1, 2, 6, 17), "weight": weight, "order": "c pt ph pw"},
        **{"channels": 3, "patch": (2, 2, 3), "grid": (2, 2, 3)},
    }


# ---- Adaptive norm ----


@_add("modulate", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"x": d("x", 2, 3, 5, 40), "shift": d("shift", 2, 40), "scale": d("scale", 2, 40)}


@_add("modulate", "per frame, weights")
def _(d: Draw) -> dict[str, Any]:
    return {
        **{"x": d("x", 2, 3, 5, 33), "shift": d("shift", 2, 3, 33), "scale": d("scale", 2, 3, 33, dtype=torch.float32)},
        **{"weight": d("weight", 33, around=1.0), "bias": d("bias", 33), "eps": 1e-5},
    }


@_add("modulate", "per token, rms", "layout")
def _(d: Draw) -> dict[str, Any]:
    shift, scale = d("shift", 1, 4, 3, 72), d("scale", 1, 72)
    return {"x": d("x", 1, 4, 3, 72), "shift": shift, "scale": scale, "kind": "rms"}


@_add("gate_residual", "plain", "plain", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"residual": d("residual", 2, 3, 5, 40), "x": d("x", 2, 3, 5, 40), "gate": d("gate", 2, 40)}


@_add("gate_residual", "per frame")
def _(d: Draw) -> dict[str, Any]:
    gate = d("gate", 2, 4, 19, dtype=torch.float32)
    return {"residual": d("residual", 2, 4, 3, 19), "x": d("x", 2, 4, 3, 19), "gate": gate}


@_add("gate_residual", "per token", "layout")
def _(d: Draw) -> dict[str, Any]:
    return {"residual": d("residual", 1, 2, 9, 64), "x": d("x", 1, 2, 9, 64), "gate": d("gate", 1, 2, 9, 64)}
