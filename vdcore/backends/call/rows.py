"""Calls of the operators around attention: patches, and adaptive norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vdcore.backends.call.base import Call, empty


@dataclass
class PatchifyCall(Call):
    """video ``(B, C, T, H, W)``, weight ``(E, C, pt, ph, pw)``, bias ``(E,)``."""

    TENSORS: ClassVar[tuple[str, ...]] = ("video", "weight", "bias?")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ()

    video: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def is_empty(self) -> bool:
        return self.video.numel() == 0 or self.weight.numel() == 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.video, self.weight, self.bias)

    def attributes(self) -> tuple[Any, ...]:
        return ()

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> PatchifyCall:
        return cls(op, grad, *tensors)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        B, _, T, H, W = self.video.shape
        E, _, pt, ph, pw = self.weight.shape
        return (empty(self.video, (B, T // pt, (H // ph) * (W // pw), E)),)


@dataclass
class UnpatchifyCall(Call):
    """tokens ``(B, T', H'*W', E)``, weight ``(channels*pt*ph*pw, E)``, bias ``(channels*pt*ph*pw,)``."""

    TENSORS: ClassVar[tuple[str, ...]] = ("tokens", "weight", "bias?")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("SymInt channels", "SymInt[] patch", "SymInt[] grid", "str order")

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    channels: int
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    order: str

    @property
    def is_empty(self) -> bool:
        return self.tokens.numel() == 0 or self.weight.numel() == 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.tokens, self.weight, self.bias)

    def attributes(self) -> tuple[Any, ...]:
        return (self.channels, list(self.patch), list(self.grid), self.order)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> UnpatchifyCall:
        channels, patch, grid, order = attributes
        tokens, weight, bias = tensors
        return cls(op, grad, tokens, weight, bias, channels, tuple(patch), tuple(grid), order)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        (pt, ph, pw), (T, H, W) = self.patch, self.grid
        return (empty(self.tokens, (self.tokens.shape[0], self.channels, T * pt, H * ph, W * pw)),)


@dataclass
class ModulateCall(Call):
    """x ``(B, T, S, C)``, shift and scale ``(B, C)``, ``(B, T, C)`` or ``(B, T, S, C)``, weight and bias ``(C,)``."""

    TENSORS: ClassVar[tuple[str, ...]] = ("x", "shift", "scale", "weight?", "bias?")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("str kind", "float eps")

    x: Tensor
    shift: Tensor
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None
    kind: str
    eps: float

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.shift, self.scale, self.weight, self.bias)

    def attributes(self) -> tuple[Any, ...]:
        return (self.kind, self.eps)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> ModulateCall:
        return cls(op, grad, *tensors, *attributes)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        return (empty(self.x, self.x.shape),)


@dataclass
class GateResidualCall(Call):
    """residual and x ``(B, T, S, C)``, gate as shift in :class:`ModulateCall`."""

    TENSORS: ClassVar[tuple[str, ...]] = ("residual", "x", "gate")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
    PASSED: ClassVar[dict[str, int]] = {"residual": 0}

    residual: Tensor
    x: Tensor
    gate: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.residual, self.x, self.gate)

    def attributes(self) -> tuple[Any, ...]:
        return ()

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> GateResidualCall:
        return cls(op, grad, *tensors)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        return (empty(self.residual, self.residual.shape),)
