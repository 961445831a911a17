"""What a job is: an operator on a workload's shape, its inputs as models have them, its work and its traffic.

A job's tensors are leaves with names; :meth:`Job.arguments` makes the public function's keyword arguments from them,
for vdcore and every peer alike. Queries, keys and values are strided views of packed projections. The operators are in
jobs.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vdcore import FrameMask, GridMask, QKNorm, Rope, axial_rope
from vdcore_bench.workloads import Shape, Workload

MODES = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = dict[str, Tensor]
Cut = dict[int, list[int]]  # axis -> indices that stay


@dataclass(frozen=True)
class Cuts:
    """A piece of a job that depends on nothing outside it, small enough for the float64 reference.

    Args:
        tensors: how its inputs are cut, by name; those not named stay whole.
        outputs: how its outputs are cut, in order.
        gradients: the leaves whose gradient the piece determines.
    """

    tensors: dict[str, Cut] = field(default_factory=dict)
    outputs: tuple[Cut, ...] = ({}, {})
    gradients: frozenset[str] = frozenset()


def cut(x: Tensor, axes: Cut) -> Tensor:
    for axis, kept in axes.items():
        x = x.index_select(axis, torch.tensor(kept, device=x.device))
    return x


def mask_text(mask: FrameMask | GridMask) -> str:
    """``"past 30, future 0"``; empty if everything is visible. Of long radii the first and the last stand for all."""
    if isinstance(mask, FrameMask):
        names = ("past", "future", "chunk", "sink")
        return ", ".join(f"{n} {getattr(mask, n)}" for n in names if getattr(mask, n) != getattr(FrameMask(), n))
    radii = {name: _radii(getattr(mask, name)) for name in ("rows", "columns") if getattr(mask, name) is not None}
    tile = f"tiles of {' x '.join(map(str, mask.tile))}" if mask.tile != (1, 1, 1) else ""
    sink = f"{mask.sink} in full" if mask.sink else ""
    shift = "shifted" if mask.border == "shift" else ""
    parts = [mask_text(mask.frames), *(f"{name} {text}" for name, text in radii.items()), tile, sink, shift]
    return ", ".join(filter(None, parts))


def _radii(radii: Any) -> str:
    if not isinstance(radii, tuple) or len(radii) == 1:
        return str(radii)
    return "/".join(map(str, radii)) if len(radii) < 5 else f"{radii[0]}..{radii[-1]}"


@dataclass(frozen=True)
class Job:
    """One operator, shape, mode, dtype and device.

    Args:
        original: the workload's shape, before it was cut to the machine.
        mask: which frames a frame sees, where the operator takes a mask.
        grid_mask: of video attention, in its place: windows in rows and columns. Few peers know these: they say so.
        norm_rope: with the model's norm and rotary embedding of q and k, where the operator takes them.
    """

    AXES: ClassVar[tuple[str, ...]] = ("rows", "heads")  # in this order a shape is cut
    MEMORY_BOUND: ClassVar[bool] = True
    CONSTANT: ClassVar[tuple[str, ...]] = ()  # tensors that get no gradient
    ROTATES: ClassVar[bool] = True

    op: str
    workload: Workload
    original: Shape
    shape: Shape
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    norm_rope: bool = False
    mask: FrameMask = field(default_factory=FrameMask)
    grid_mask: GridMask | None = None

    # ---- what a family defines ----

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are drawn at random, by name."""
        raise NotImplementedError

    def arguments(self, t: Tensors) -> dict[str, Any]:
        """Keyword arguments of the public function."""
        raise NotImplementedError

    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        raise NotImplementedError

    def forward_flops(self) -> float:
        return 0.0

    def backward_flops(self) -> float:
        return 0.0

    def cuts(self) -> Cuts:
        return Cuts(gradients=frozenset(self.learned))

    @classmethod
    def why_not(cls, workload: Workload) -> str | None:
        """The reason why a workload has no such operator."""
        return None

    # ---- what follows ----

    @classmethod
    def mask_of(cls, workload: Workload) -> FrameMask:
        """The mask that the model gives this operator."""
        return FrameMask.full()

    @property
    def case(self) -> str:
        return "norm + rope" if self.norm_rope else "plain"

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f"{self.op}, {self.case}, {self.workload.name}, {self.mode}, {DTYPE_NAMES[self.dtype]}"

    @property
    def has_backward(self) -> bool:
        return "bwd" in self.mode

    @property
    def learned(self) -> tuple[str, ...]:
        """The leaves that get a gradient."""
        return tuple(name for name in self.tensor_sizes if name not in self.CONSTANT)

    @cached_property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        return {**self.sizes(), **self.norm_sizes()}

    def tensors(self, seed: int = 0) -> Tensors:
        """The leaves, drawn at random, and the rotary table."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = {}
        for name, size in self.tensor_sizes.items():
            x = torch.empty(size, dtype=self.dtype, device=self.device).normal_(generator=generator)
            if name.endswith("weight"):
                fan_in = math.prod(size[1:])
                x = x.mul_(0.1).add_(1) if len(size) == 1 else x.mul_(fan_in**-0.5)
            drawn[name] = x
        if self.norm_rope and self.ROTATES:
            rope = self.rope_table()
            drawn |= {"cos": rope.cos, "sin": rope.sin}
        return drawn

    def leaves(self) -> Tensors:
        """The same; those that learn require gradients where the mode has a backward pass."""
        tensors = self.tensors()
        for name in self.learned if self.has_backward else ():
            tensors[name].requires_grad_()
        return tensors

    def flops(self) -> float:
        """Of the mode: 4 D per visible pair and head forward, 10 D backward; 2 per product of a projection."""
        forward = self.forward_flops() if "fwd" in self.mode else 0.0
        return forward + (self.backward_flops() if self.has_backward else 0.0)

    def traffic(self) -> int:
        """The least bytes: every input, output and gradient moved once a pass."""
        size = self.dtype.itemsize
        inputs = sum(map(math.prod, self.tensor_sizes.values()))
        outputs = sum(map(math.prod, self.output_sizes()))
        learned = sum(math.prod(self.tensor_sizes[name]) for name in self.learned)
        forward = inputs + outputs
        backward = inputs + learned + outputs * (2 if "attention" in self.op else 1)
        return size * (("fwd" in self.mode) * forward + self.has_backward * backward)

    def memory(self) -> int:
        """Bytes of the inputs, outputs and gradients, without what a provider needs beside them."""
        size = self.dtype.itemsize
        inputs, outputs = (sum(map(math.prod, x)) for x in (self.tensor_sizes.values(), self.output_sizes()))
        return size * ((inputs + outputs) * (2 if self.has_backward else 1))

    # ---- norm and rope ----

    @property
    def norm_kind(self) -> tuple[Literal["rms", "layer"], Literal["head", "all"]]:
        """Kind and reach, as QKNorm has them."""
        return self.workload.qk_norm or ("rms", "head")

    def norm_sizes(self) -> dict[str, tuple[int, ...]]:
        if not self.norm_rope:
            return {}
        kind, over = self.norm_kind
        channels = {"q": self.shape.D, "k": self.shape.D}
        if over == "all":
            channels = {"q": self.shape.H * self.shape.D, "k": self.shape.G * self.shape.D}
        parts = ("weight", "bias") if kind == "layer" else ("weight",)
        return {f"{x}_{part}": (n,) for part in parts for x, n in channels.items()}

    def norm(self, t: Tensors) -> QKNorm | None:
        if not self.norm_rope:
            return None
        kind, over = self.norm_kind
        return QKNorm(t["q_weight"], t["k_weight"], kind, over, 1e-6, t.get("q_bias"), t.get("k_bias"))

    def rope_dims(self) -> tuple[int, int, int]:
        """Rotated channels along frames, rows and columns."""
        D, known = self.shape.D, self.workload.rope_dims
        if known is not None and sum(known) <= D:
            return known
        space = D // 6 * 2
        return (D - D % 2 - 2 * space, space, space)

    def rope_table(self) -> Rope:
        s = self.shape
        return axial_rope((s.T, s.rows, s.columns), self.rope_dims(), device=self.device)

    def rope(self, t: Tensors) -> Rope | None:
        return Rope(t["cos"], t["sin"]) if self.norm_rope else None

    # ---- packed projections ----

    def projection_sizes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        B, T, S, H, G, D = (getattr(self.shape, x) for x in ("B", "T", "S", "H", "G", "D"))
        if G == H:
            return {prefix + "qkv": (B, T, S, 3, H, D)}
        return {prefix + "q": (B, T, S, H, D), prefix + "kv": (B, T, S, 2, G, D)}

    @staticmethod
    def qkv(t: Tensors, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        if prefix + "qkv" in t:
            return t[prefix + "qkv"].unbind(-3)  # type: ignore[return-value]
        return (t[prefix + "q"], *t[prefix + "kv"].unbind(-3))  # type: ignore[return-value]

    def head_cuts(self, prefix: str = "") -> dict[str, Cut]:
        """One key head and the query heads that share it; all of them under a norm over all heads."""
        if self.norm_rope and self.norm_kind[1] == "all":
            return {}
        queries = list(range(self.shape.H // self.shape.G))
        found = {}
        for name, size in self.projection_sizes(prefix).items():
            heads = len(size) - 2
            found[name] = {heads: queries if name == prefix + "q" else [0]}
        return found

    def output_heads(self) -> Cut:
        cut_heads = bool(self.head_cuts())
        return {3: list(range(self.shape.H // self.shape.G))} if cut_heads else {}
