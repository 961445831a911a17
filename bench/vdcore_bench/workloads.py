"""Shapes of released video models, from workloads.json, and how they are cut down to a machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from vdcore import FrameMask


@dataclass(frozen=True)
class Shape:
    """Sizes by the letters of the contract; S = rows * columns tokens per frame, L text tokens."""

    B: int
    T: int
    rows: int
    columns: int
    H: int
    G: int
    D: int
    L: int = 0

    @property
    def S(self) -> int:
        return self.rows * self.columns

    @property
    def C(self) -> int:
        """Channels of a token."""
        return self.H * self.D

    def describe(self, original: Shape) -> str:
        """``"frames 30, tokens 3600 -> 560, heads 16"``."""
        pairs = {"batch": "B", "frames": "T", "tokens": "S", "heads": "H"}
        parts = []
        for word, letter in pairs.items():
            before, now = getattr(original, letter), getattr(self, letter)
            if word != "batch" or now > 1:
                parts.append(f"{word} {now}" if before == now else f"{word} {before} -> {now}")
        return ", ".join(parts)

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("B", "T", "S", "rows", "columns", "H", "G", "D", "L")}


@dataclass(frozen=True)
class Workload:
    """One row of workloads.json.

    Args:
        attention: which kinds of self-attention it has: spatial, temporal, video.
        mask: of its video attention, as arguments of FrameMask; None: every frame sees every frame.
        text: how text tokens take part: ``"cross"``, ``"joint"`` (they join the video's sequence) or None.
        qk_norm: kind and reach, as QKNorm has them.
        rope: whether it rotates q and k; ``rope_dims``: channels along frames, rows and columns, where they are known.
        latent: channels, frames, height, width.
    """

    name: str
    source: str
    frames: int
    tokens_per_frame: int
    grid: tuple[int, int]
    heads: int
    kv_heads: int
    head_dim: int
    attention: tuple[str, ...]
    mask: FrameMask
    text: str | None
    text_tokens: int
    qk_norm: tuple[Literal["rms", "layer"], Literal["head", "all"]] | None
    rope: bool
    rope_dims: tuple[int, int, int] | None
    latent: tuple[int, int, int, int] | None
    patch: tuple[int, int, int] | None
    layers: Any
    note: str

    def shape(self, batch: int = 1) -> Shape:
        return Shape(
            B=batch,
            T=self.frames,
            rows=self.grid[0],
            columns=self.grid[1],
            H=self.heads,
            G=self.kv_heads,
            D=self.head_dim,
            L=self.text_tokens,
        )

    @property
    def joint_text(self) -> bool:
        """Text tokens join the video's sequence."""
        return self.text == "joint" and self.text_tokens > 0

    @property
    def factorized(self) -> bool:
        return "video" not in self.attention

    @property
    def ops(self) -> tuple[str, ...]:
        """The operators that this model runs, as its description has them."""
        found = [f"{kind}_attention" for kind in self.attention]
        if len(found) == 2:
            found.append("gated_attention")
        if self.text == "cross":
            found.append("cross_attention")
        if self.qk_norm or self.rope:
            found.append("qk_norm_rope")
        if self.patch and self.latent:
            found += ["patchify", "unpatchify"]
        return (*found, "modulate", "gate_residual")


@cache
def load() -> dict[str, Workload]:
    """Every workload by name, in the order of the file."""
    found = {}
    for row in json.loads(resources.files("vdcore_bench").joinpath("workloads.json").read_text())["workloads"]:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        fields["mask"] = FrameMask(**(row["mask"] or {}))
        found[row["name"]] = Workload(**fields)
    return found


@dataclass(frozen=True)
class Budget:
    """What one call may cost: floating point operations and bytes moved, both of forward."""

    flops: float
    bytes: float

    @staticmethod
    def of(device: str, threads: int, memory: int) -> Budget:
        """On a CPU 10 to 100 ms per call; on a GPU what fits into a quarter of its memory."""
        if device.startswith("cuda"):
            return Budget(math.inf, memory / 4)
        return Budget(threads * 4e9, min(threads * 150 * 2**20, memory / 16))

    @staticmethod
    def unlimited() -> Budget:
        return Budget(math.inf, math.inf)


def _smaller(shape: Shape, axis: str, original: Shape) -> Shape | None:
    """The next smaller shape along an axis, or None at its floor."""
    if axis == "heads":  # keeps the number of query heads that share a key head; two heads keep the strides honest
        ratio = shape.H // shape.G
        smaller = [g for g in range(1, shape.G) if original.G % g == 0 and g * ratio >= 2]
        return replace(shape, G=smaller[-1], H=smaller[-1] * ratio) if smaller else None
    now, whole = getattr(shape, axis), getattr(original, axis)
    parts = next((n for n in range(1, whole + 1) if whole // n < now), None)
    return None if parts is None or now == 1 else replace(shape, **{axis: whole // parts})


def scaled(shape: Shape, axes: tuple[str, ...], fits: Callable[[Shape], bool]) -> Shape:
    """The largest shape that fits, cutting one axis after the other: ``"heads"``, ``"rows"`` of tokens, ``"T"``.

    The last shape is returned even if it does not fit: the runner then says what it needs.
    """
    original = shape
    for axis in axes:
        while not fits(shape):
            smaller = _smaller(shape, axis, original)
            if smaller is None:
                break
            shape = smaller
    return shape
