"""How an operator may be called: the documented alternatives of its arguments, and how a choice of them is drawn.

A room's cases declare its :class:`Space` with :func:`space`. Tests cover every pair of alternatives, and draw random
calls (:mod:`vdcore.testing.alternatives`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.testing.cases import Draw

Choice = dict[str, Any]  # an alternative per argument


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
        alternatives: of every argument, by name.
        build: makes the keyword arguments of a choice.
        allows: False for choices that the operator refuses.
    """

    alternatives: dict[str, tuple[Any, ...]]
    build: Callable[[Draw, Choice, Sizes], dict[str, Any]]
    allows: Callable[[Choice], bool]


SPACES: dict[str, Space] = {}  # by operator


def space(op: str, allows: Callable[[Choice], bool] = lambda choice: True, **alternatives: tuple[Any, ...]) -> Any:
    """Declares an operator's space; what is decorated builds a choice's arguments."""

    def declare(build: Any) -> Any:
        SPACES[op] = Space(alternatives, build, allows)
        return build

    return declare


# ---- Parts that several operators share ----


@dataclass(frozen=True)
class TeacherForcing:
    """A mask of teacher forcing, over the frames that a call turns out to have."""

    chunk: int
    past: int | None

    def over(self, frames: int) -> FrameMask:
        return FrameMask.teacher_forcing(max(-(-frames // 2), 1), self.chunk, self.past)


def draw_mask(given: FrameMask | TeacherForcing, frames: int) -> FrameMask:
    """Of a call whose key frames, or last query frame, are so many."""
    return given.over(frames) if isinstance(given, TeacherForcing) else given


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
# In place of one of the others, in calls that were drawn with these.
MORE_MASKS = (
    FrameMask(past=1, future=0, shots=(0, 2)),
    TeacherForcing(1, None),
    FrameMask(past=0, future=1, chunk=2, shots=(0, 3)),
    TeacherForcing(2, 1),
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
NORM_ROPE: dict[str, tuple[Any, ...]] = {"norm": NORMS, "rope": ROPES}
BIAS = (None, "same", "float32")


def draw_norm(d: Draw, given: Any, H: int, G: int, D: int, prefix: str = "") -> QKNorm | None:
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


def draw_rope(d: Draw, given: Any, frames: int, S: int, H: int, D: int, prefix: str = "") -> Rope | None:
    if given is None:
        return None
    rows, tokens, per_head, style, wide = given
    shape = (frames if rows == "T" else 1, S if tokens == "S" else 1, *((H,) if per_head else ()), D // 4)
    angle = torch.randn(shape, generator=d.generator, dtype=torch.float64)
    dtype = torch.float32 if wide else None
    return Rope(d.leaf(prefix + "cos", angle.cos(), dtype), d.leaf(prefix + "sin", angle.sin(), dtype), style)


def draw_lengths(d: Draw, given: str | None, sizes: tuple[int, ...], most: int) -> Tensor | None:
    """Random ones; "beyond" holds a negative one and one above the size too, which count as 0 and as the size."""
    if given is None:
        return None
    low, high = (-2, most + 2) if given == "beyond" else (0, most)
    found = torch.randint(low, high + 1, sizes, generator=d.generator)
    if given == "beyond" and found.numel():
        found.view(-1)[0] = -1
    return found.to(torch.int32 if given == "int32" else torch.int64).to(d.device)


def draw_qkv(d: Draw, c: Choice, n: Sizes, prefix: str = "") -> tuple[dict[str, Tensor], int, int]:
    """q, k, v by the choices ``keys`` and ``heads``, the number of key frames, and of key heads."""
    G = n.H // 2 if c["heads"] == "grouped" else n.H
    if c["keys"] == "packed":
        return {"q": d(prefix + "q", n.B, n.T, n.S, 3, n.H, n.D)}, n.T, n.H
    T_k = {"same": n.T, "more": n.T + 3, "fewer": max(n.T - 1, 1)}[c["keys"]]
    keys = (n.B, T_k, n.S, G, n.D)
    tensors = {"q": d(prefix + "q", n.B, n.T, n.S, n.H, n.D), "k": d(prefix + "k", *keys), "v": d(prefix + "v", *keys)}
    return tensors, T_k, G


def heads_allow(c: Choice) -> bool:
    if c["keys"] == "packed" and c["heads"] == "grouped":
        return False
    return not (c["rope"] and c["rope"][2] and c["heads"] == "grouped")


def draw_bias(d: Draw, given: str | None, size: int) -> Tensor | None:
    return None if given is None else d("bias", size, spread=0.5, dtype=torch.float32 if given == "float32" else None)
