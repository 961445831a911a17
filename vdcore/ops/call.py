"""What all calls share, and how masks, norms and rotary tables cross a torch operator's boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope


@dataclass
class Call:
    """What all calls share.

    Args:
        op: the public function.
        grad: gradients will be wanted, so that forward keeps what backward needs.
    """

    TENSORS: ClassVar[tuple[str, ...]]  # "?": may be None
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # torch schema declarations
    OUTPUTS: ClassVar[int] = 1
    SAVES_OUTPUTS: ClassVar[bool] = False
    PASSED: ClassVar[dict[str, int]] = {}  # tensor -> output whose gradient is the tensor's: no backend is asked for it

    op: str
    grad: bool

    @property
    def main(self) -> Tensor:
        """The tensor whose device and dtype are the call's."""
        return self.tensors()[0]  # type: ignore[return-value]

    @property
    def is_empty(self) -> bool:
        """There is nothing to compute with: no kernel need know what to do then."""
        return self.main.numel() == 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def attributes(self) -> tuple[Any, ...]:
        raise NotImplementedError

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> Call:
        raise NotImplementedError

    def empty_outputs(self) -> tuple[Tensor, ...]:
        """What forward fills: contiguous, whatever the strides of the inputs."""
        raise NotImplementedError


def empty(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


# ---- QKNorm and Rope across the boundary ----

NORM = ("q_weight?", "k_weight?", "q_bias?", "k_bias?")
ROPE = ("cos?", "sin?")
NORM_ATTRIBUTES = ("str norm", "float eps")
ROPE_ATTRIBUTES = ("str rope",)


def norm_tensors(norm: QKNorm | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)


def norm_attributes(norm: QKNorm | None) -> tuple[str, float]:
    return ("", 0.0) if norm is None else (f"{norm.kind}/{norm.over}", norm.eps)


def build_norm(tensors: tuple[Any, ...], name: str, eps: float) -> QKNorm | None:
    if not name:
        return None
    kind: Any
    over: Any
    kind, over = name.split("/")
    q_weight, k_weight, q_bias, k_bias = tensors
    return QKNorm(q_weight, k_weight, kind, over, eps, q_bias, k_bias)


def rope_tensors(rope: Rope | None) -> tuple[Tensor | None, ...]:
    return (None, None) if rope is None else (rope.cos, rope.sin)


def build_rope(tensors: tuple[Any, ...], style: Any) -> Rope | None:
    return Rope(tensors[0], tensors[1], style) if style else None


_UNBOUNDED = 2**31 - 1  # no video has more frames; keeps products of two such numbers inside int64


def mask_numbers(mask: FrameMask) -> list[int]:
    past, future = (-1 if x is None or x >= _UNBOUNDED else x for x in (mask.past, mask.future))
    return [past, future, min(mask.chunk, _UNBOUNDED), min(mask.sink, _UNBOUNDED)]


def build_mask(numbers: list[int]) -> FrameMask:
    past, future, chunk, sink = numbers
    return FrameMask(None if past < 0 else past, None if future < 0 else future, chunk, sink)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
