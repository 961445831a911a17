"""Every argument's documented alternatives, and cases of all pairs of them.

An argument whose alternatives are tried one at a time, or in matched pairs, hides what two of them do together. A
:class:`Space` declares the alternatives of an operator's arguments; :func:`pairwise` covers every pair of them with few
cases, and random calls draw from the same declaration.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore.testing.cases import DISTRIBUTIONS, Case, Draw
from vdcore.testing.layouts import LAYOUTS

Choice = dict[str, Any]  # an alternative per argument
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call; S, R, L are used where the operator has them."""

    B: int = 2
    T: int = 4
    S: int = 3
    H: int = 4  # even, so that it can be grouped
    D: int = 24  # even, so that half of it can be rotated
    L: int = 5

    @staticmethod
    def drawn(rng: random.Random) -> Sizes:
        pick = rng.choice
        return Sizes(
            pick((1, 2, 3)),
            pick((1, 2, 5, 9)),
            pick((1, 2, 3, 7)),
            pick((2, 4, 6)),
            pick((8, 18, 24, 40)),
            pick((1, 5, 9)),
        )


@dataclass(frozen=True)
class Space:
    """How an operator may be called.

    Args:
        op: the public function.
        alternatives: of every argument, by name.
        build: makes the keyword arguments of a choice.
        allows: False for choices that the operator refuses.
    """

    op: str
    alternatives: dict[str, tuple[Any, ...]]
    build: Callable[[Draw, Choice, Sizes], dict[str, Any]]
    allows: Callable[[Choice], bool] = lambda choice: True

    def case(self, choice: Choice, sizes: Sizes) -> Case:
        """A case; its dtype and layout are the choice's ``dtype`` and ``layout``, which a test passes on."""
        names = [f"{name}={_named(value)}" for name, value in choice.items()]
        return Case(
            self.op,
            f"{', '.join(names)}, {sizes}",
            lambda d: self.build(d, choice, sizes),
            frozenset(),
            choice["values"],
        )


def _named(value: Any) -> str:
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


def pairwise(space: Space, seed: int = 0) -> Iterator[tuple[Choice, Sizes]]:
    """Choices and sizes that hold every allowed pair of alternatives of two arguments, greedily few."""
    rng = random.Random(seed)
    names = list(space.alternatives)
    left = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(space.alternatives[a]))
        for j in range(len(space.alternatives[b]))
    }

    def pairs(indices: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
        return {frozenset(pair) for pair in itertools.combinations(indices.items(), 2)}

    def choice_of(indices: dict[str, int]) -> Choice:
        return {name: space.alternatives[name][indices[name]] for name in names}

    def completed(fixed: dict[str, int]) -> dict[str, int]:
        return {name: fixed.get(name, rng.randrange(len(space.alternatives[name]))) for name in names}

    while left:
        first = min(left, key=lambda pair: sorted(pair))
        trials = [t for t in (completed(dict(first)) for _ in range(60)) if space.allows(choice_of(t))]
        if not trials:  # the operator refuses this pair
            left.discard(first)
            continue
        best = max(trials, key=lambda t: len(pairs(t) & left))
        left -= pairs(best)
        yield choice_of(best), Sizes.drawn(rng)


# ---- Parts that several operators share ----

MASKS = (
    FrameMask(),
    FrameMask.causal(),
    FrameMask.same_frame(),
    FrameMask.window(2),
    FrameMask.symmetric(1),
    FrameMask(past=1, sink=2),
    FrameMask(past=1, future=1, chunk=2),
    FrameMask(past=0, future=0, chunk=3, sink=1),
)
# (kind, over, which weights), and whether weights are float32 beside half precision
NORMS = (
    None,
    ("rms", "head", "qk", False),
    ("rms", "all", "qk", True),
    ("rms", "head", "q", True),
    ("rms", "head", "", False),
    ("layer", "head", "qk+", False),
    ("layer", "all", "qk+", False),
    ("layer", "head", "k", True),
    ("layer", "all", "+", True),
)
# (frames: of T or 1, tokens: S or 1, per head, style, float32 beside half precision)
ROPES = (
    None,
    ("T", "S", False, "interleaved", False),
    ("T", "1", False, "half", True),
    ("1", "S", False, "interleaved", True),
    ("1", "1", False, "half", False),
    ("T", "S", True, "half", False),
    ("T", "1", True, "interleaved", False),
)
COMMON: dict[str, tuple[Any, ...]] = {
    "values": tuple(DISTRIBUTIONS),
    "dtype": DTYPES,
    "layout": tuple(LAYOUTS),
}


def _norm(d: Draw, given: Any, H: int, G: int, D: int, prefix: str = "") -> QKNorm | None:
    """Weights of q and of k where named, biases with "+"."""
    if given is None:
        return None
    kind, over, names, wide = given
    sizes = {"q": D, "k": D} if over == "head" else {"q": H * D, "k": G * D}
    dtype = torch.float32 if wide else None
    found: dict[str, Tensor | None] = {}
    for n, size in sizes.items():
        if n in names:
            found[f"{n}_weight"] = d(f"{prefix}{n}_weight", size, around=1.0, spread=0.3, dtype=dtype)
        if "+" in names:
            found[f"{n}_bias"] = d(f"{prefix}{n}_bias", size, around=0.1, spread=0.3, dtype=dtype)
    return QKNorm(
        found.get("q_weight"), found.get("k_weight"), kind, over, 1e-5, found.get("q_bias"), found.get("k_bias")
    )


def _rope(d: Draw, given: Any, frames: int, S: int, H: int, D: int, prefix: str = "") -> Rope | None:
    if given is None:
        return None
    rows, tokens, per_head, style, wide = given
    shape = (frames if rows == "T" else 1, S if tokens == "S" else 1, *((H,) if per_head else ()), D // 4)
    angle = torch.randn(shape, generator=d.generator, dtype=torch.float64)
    dtype = torch.float32 if wide else None
    return Rope(d.leaf(prefix + "cos", angle.cos(), dtype), d.leaf(prefix + "sin", angle.sin(), dtype), style)


def _lengths(d: Draw, given: str | None, sizes: tuple[int, ...], most: int) -> Tensor | None:
    """Random ones; "beyond" holds a negative one and one above the size too, which count as 0 and as the size."""
    if given is None:
        return None
    low, high = (-2, most + 2) if given == "beyond" else (0, most)
    found = torch.randint(low, high + 1, sizes, generator=d.generator)
    if given == "beyond" and found.numel():
        found.view(-1)[0] = -1
    return found.to(torch.int32 if given == "int32" else torch.int64).to(d.device)


def _video_qkv(d: Draw, c: Choice, n: Sizes, prefix: str = "") -> tuple[dict[str, Tensor], int, int]:
    """q, k, v by the choices ``keys`` and ``heads``, the number of key frames, and of key heads."""
    G = n.H // 2 if c["heads"] == "grouped" else n.H
    if c["keys"] == "packed":
        return {"q": d(prefix + "q", n.B, n.T, n.S, 3, n.H, n.D)}, n.T, n.H
    T_k = {"same": n.T, "more": n.T + 3, "fewer": max(n.T - 1, 1)}[c["keys"]]
    keys = (n.B, T_k, n.S, G, n.D)
    tensors = {"q": d(prefix + "q", n.B, n.T, n.S, n.H, n.D), "k": d(prefix + "k", *keys), "v": d(prefix + "v", *keys)}
    return tensors, T_k, G


def _frames_allow(c: Choice) -> bool:
    if c["keys"] == "packed" and c["heads"] == "grouped":
        return False
    return not (c["rope"] and c["rope"][2] and c["heads"] == "grouped")


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
    **COMMON,
}


def _frames(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, T_k, G = _video_qkv(d, c, n)
    start = max(T_k - n.T, 0) if c["q_start"] is None else c["q_start"]
    return {
        **tensors,
        "mask": c["mask"],
        "q_start": c["q_start"],
        "lengths": _lengths(d, c["lengths"], (n.B,), T_k),
        "scale": c["scale"],
        "norm": _norm(d, c["norm"], n.H, G, n.D),
        "rope": _rope(d, c["rope"], max(T_k, start + n.T), n.S, n.H, n.D),
        "return_lse": c["return_lse"],
    }


def _video(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    args = _frames(d, c, n)
    if c["text"] is None:
        return args
    G = args["k"].shape[3] if "k" in args else n.H
    heads = {"q": n.H, "k": G, "v": G}
    return {
        **args,
        "text": tuple(d(f"text_{name}", n.B, n.L, h, n.D) for name, h in heads.items()),
        "text_lengths": _lengths(d, c["text_lengths"], (n.B,), n.L),
        "text_norm": _norm(d, c["text_norm"], n.H, G, n.D, "text_"),
        "text_first": c["text_first"],
        "text_sees": c["text_sees"],
    }


def _spatial(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, _, G = _video_qkv(d, c, n)
    norm, rope = _norm(d, c["norm"], n.H, G, n.D), _rope(d, c["rope"], n.T, n.S, n.H, n.D)
    return {**tensors, "scale": c["scale"], "norm": norm, "rope": rope, "return_lse": c["return_lse"]}


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


def _gated(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    same = {**c, "keys": "same"}
    spatial, _, G = _video_qkv(d, same, n)
    temporal = spatial
    G_t = G
    if c["tensors"] == "apart":
        temporal, _, G_t = _video_qkv(d, {**same, "heads": c["temporal_heads"]}, n, "temporal_")
    return {
        "spatial": tuple(spatial.values()),
        "temporal": tuple(temporal.values()),
        "gate": _gate(d, c["gate"], n),
        "mask": c["mask"],
        "lengths": _lengths(d, c["lengths"], (n.B,), n.T),
        "scale": c["scale"],
        "norm": (_norm(d, c["norm"], n.H, G, n.D), _norm(d, c["temporal_norm"], n.H, G_t, n.D, "temporal_")),
        "rope": (
            _rope(d, c["rope"], n.T, n.S, n.H, n.D),
            _rope(d, c["temporal_rope"], n.T, n.S, n.H, n.D, "temporal_"),
        ),
    }


def _gated_allows(c: Choice) -> bool:
    temporal_heads = c["temporal_heads"] if c["tensors"] == "apart" else c["heads"]
    if c["rope"] and c["rope"][2] and c["heads"] == "grouped":
        return False
    return not (c["temporal_rope"] and c["temporal_rope"][2] and temporal_heads == "grouped")


def _cross(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    G = n.H // 2 if c["heads"] == "grouped" else n.H
    keys = (n.B, n.T, n.L, G, n.D) if c["keys"] == "frame" else (n.B, n.L, G, n.D)
    lengths = (n.B, n.T) if c["lengths_per"] == "frame" else (n.B,)
    return {
        "q": d("q", n.B, n.T, n.S, n.H, n.D),
        "k": d("k", *keys),
        "v": d("v", *keys),
        "lengths": _lengths(d, c["lengths"], lengths, n.L),
        "scale": c["scale"],
        "norm": _norm(d, c["norm"], n.H, G, n.D),
        "return_lse": c["return_lse"],
    }


def _qk_norm_rope(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    tensors, T_k, G = _video_qkv(d, c, n)
    frames = c["frame_start"] + max(n.T, T_k)
    return {
        "q": tensors["q"],
        "k": tensors["k"],
        "norm": _norm(d, c["norm"], n.H, G, n.D),
        "rope": _rope(d, c["rope"], frames, n.S, n.H, n.D),
        "frame_start": c["frame_start"],
    }


def _bias(d: Draw, given: str | None, size: int) -> Tensor | None:
    return None if given is None else d("bias", size, spread=0.5, dtype=torch.float32 if given == "float32" else None)


def _patchify(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    pt, ph, pw = c["patch"]
    C = c["channels"]
    video = d("video", n.B, C, n.T * pt, n.S * ph, n.L * pw)
    weight = d("weight", n.D, C, pt, ph, pw, spread=0.3)
    return {"video": video, "weight": weight, "bias": _bias(d, c["bias"], n.D)}


def _unpatchify(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    rows = c["channels"] * c["patch"][0] * c["patch"][1] * c["patch"][2]
    return {
        "tokens": d("tokens", n.B, n.T, n.S * n.L, n.D),
        "weight": d("weight", rows, n.D, spread=0.3),
        "bias": _bias(d, c["bias"], rows),
        "channels": c["channels"],
        "patch": c["patch"],
        "grid": (n.T, n.S, n.L),
        "order": c["order"],
    }


def _per(d: Draw, name: str, given: str, n: Sizes) -> Tensor:
    shapes = {"sample": (n.B, n.D), "frame": (n.B, n.T, n.D), "token": (n.B, n.T, n.S, n.D)}
    return d(name, *shapes[given.split(",")[0]], spread=0.5, dtype=torch.float32 if "float32" in given else None)


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
        "bias": _bias(d, c["bias"], n.D),
    }


def _gate_residual(d: Draw, c: Choice, n: Sizes) -> dict[str, Any]:
    shape = (n.B, n.T, n.S, n.D)
    return {"residual": d("residual", *shape), "x": d("x", *shape), "gate": _per(d, "gate", c["gate"], n)}


PER = ("sample", "frame", "token", "sample, float32", "frame, float32")
BIAS = (None, "same", "float32")
PATCHES = ((1, 2, 2), (2, 2, 3), (1, 1, 1), (4, 1, 2))
NORM_ROPE: dict[str, tuple[Any, ...]] = {"norm": NORMS, "rope": ROPES}

SPACES = {
    space.op: space
    for space in (
        Space("temporal_attention", FRAMES, _frames, _frames_allow),
        Space(
            "video_attention",
            {
                **FRAMES,
                "text": (None, "given"),
                "text_lengths": (None, "some", "beyond"),
                "text_norm": (None, ("rms", "head", "qk", False), ("layer", "all", "qk+", True)),
                "text_first": (False, True),
                "text_sees": ("all", "text"),
            },
            _video,
            _frames_allow,
        ),
        Space(
            "spatial_attention",
            {
                "keys": ("same", "packed"),
                "heads": ("equal", "grouped"),
                "scale": (None, 0.3, -0.2),
                **NORM_ROPE,
                "return_lse": (False, True),
                **COMMON,
            },
            _spatial,
            _frames_allow,
        ),
        Space(
            "gated_attention",
            {
                "tensors": ("apart", "shared"),
                "heads": ("equal", "grouped"),
                "temporal_heads": ("equal", "grouped"),
                "gate": ("scalar", "head", "channel", "token", "frame", "sample, float32", "all"),
                "mask": MASKS,
                "lengths": (None, "some", "beyond"),
                "scale": (None, 0.3),
                **NORM_ROPE,
                "temporal_norm": NORMS,
                "temporal_rope": ROPES,
                **COMMON,
            },
            _gated,
            _gated_allows,
        ),
        Space(
            "cross_attention",
            {
                "keys": ("sample", "frame"),
                "lengths": (None, "some", "beyond", "int32"),
                "lengths_per": ("sample", "frame"),
                "heads": ("equal", "grouped"),
                "scale": (None, 0.3, -0.2),
                "norm": NORMS,
                "return_lse": (False, True),
                **COMMON,
            },
            _cross,
        ),
        Space(
            "qk_norm_rope",
            {"keys": ("same",), "heads": ("equal", "grouped"), **NORM_ROPE, "frame_start": (0, 2), **COMMON},
            _qk_norm_rope,
            _frames_allow,
        ),
        Space("patchify", {"patch": PATCHES, "channels": (1, 3, 16), "bias": BIAS, **COMMON}, _patchify),
        Space(
            "unpatchify",
            {"patch": PATCHES, "channels": (1, 3, 16), "bias": BIAS, "order": ("pt ph pw c", "c pt ph pw"), **COMMON},
            _unpatchify,
        ),
        Space(
            "modulate",
            {"shift": PER, "scale": PER, "kind": ("layer", "rms"), "weight": BIAS, "bias": BIAS, **COMMON},
            _modulate,
        ),
        Space("gate_residual", {"gate": PER, **COMMON}, _gate_residual),
    )
}
