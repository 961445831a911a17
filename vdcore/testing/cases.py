"""Cases of every operator: odd shapes, and every argument at least once. They stand in the operators' rooms."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdcore import ops
from vdcore.norm import QKNorm
from vdcore.ops.cases import DECLARED
from vdcore.rope import Rope
from vdcore.testing.layouts import lay_out

_ROOMS = [
    importlib.import_module(f"vdcore.ops.{room.name}.cases")
    for room in pkgutil.iter_modules(ops.__path__)
    if room.ispkg
]


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

    def qkv(
        self, B: int, T: int, S: int, H: int, D: int, T_k: int = 0, G: int = 0, prefix: str = ""
    ) -> dict[str, Tensor]:
        T_k, G = T_k or T, G or H
        return {
            "q": self(prefix + "q", B, T, S, H, D),
            "k": self(prefix + "k", B, T_k, S, G, D),
            "v": self(prefix + "v", B, T_k, S, G, D),
        }

    def norm(
        self, H: int, G: int, D: int, kind: str = "rms", over: str = "head", prefix: str = "", **kw: Any
    ) -> QKNorm:
        q, k = (D, D) if over == "head" else (H * D, G * D)
        weights = [
            self(prefix + name, n, around=1.0, spread=0.3, **kw) for name, n in (("q_weight", q), ("k_weight", k))
        ]
        biases: list[Tensor | None] = [None, None]
        if kind == "layer":
            biases = [self(prefix + name, n, spread=0.3, **kw) for name, n in (("q_bias", q), ("k_bias", k))]
        return QKNorm(weights[0], weights[1], kind, over, 1e-5, biases[0], biases[1])  # type: ignore[arg-type]

    def rope(self, *shape: int, style: str = "interleaved", prefix: str = "", dtype: Any = None) -> Rope:
        angle = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        cos, sin = self.leaf(prefix + "cos", angle.cos(), dtype), self.leaf(prefix + "sin", angle.sin(), dtype)
        return Rope(cos, sin, style)  # type: ignore[arg-type]


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


CASES: list[Case] = [Case(op, name, build, frozenset(tags)) for op, name, build, tags in DECLARED]
TORCH_FORMS = {op: forms for room in _ROOMS for op, forms in room.FORMS.items()}


def cases_of(*ops: str, tag: str | None = None) -> list[Case]:
    """Cases of the named operators, or of all, that carry the tag."""
    return [c for c in CASES if (not ops or c.op in ops) and (tag is None or tag in c.tags)]
