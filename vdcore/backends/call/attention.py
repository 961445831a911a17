"""Calls of attention, and of norm and rope alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vdcore.backends.call.base import (
    NORM,
    NORM_ATTRIBUTES,
    ROPE,
    ROPE_ATTRIBUTES,
    Call,
    build_mask,
    build_norm,
    build_rope,
    empty,
    lse_dtype,
    mask_numbers,
    norm_attributes,
    norm_tensors,
    rope_tensors,
)
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass
class AttentionCall(Call):
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; with ``packed``, views of ``(B, T, S, 3, H, D)``."""

    OUTPUTS: ClassVar[int] = 2
    SAVES_OUTPUTS: ClassVar[bool] = True

    q: Tensor
    k: Tensor
    v: Tensor
    packed: Tensor | None
    mask: FrameMask
    q_start: int
    lengths: Tensor | None
    scale: float
    norm: QKNorm | None
    rope: Rope | None
    return_lse: bool

    @property
    def lse(self) -> bool:
        """Forward is to write lse: asked for, or needed by backward."""
        return self.return_lse or self.grad

    def _qkv(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, self.v) if self.packed is None else (self.packed, None, None)

    @staticmethod
    def _unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if k is None or v is None:
            return (*q.unbind(3), q)  # type: ignore[return-value]
        return q, k, v, None

    @property
    def main(self) -> Tensor:
        return self.q

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.k.numel() == 0


@dataclass
class TemporalCall(AttentionCall):
    TENSORS: ClassVar[tuple[str, ...]] = ("q", "k?", "v?", "lengths?", *NORM, *ROPE)
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "int[] mask",
        "SymInt q_start",
        "float scale",
        "bool return_lse",
        *NORM_ATTRIBUTES,
        *ROPE_ATTRIBUTES,
    )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self._qkv(), self.lengths, *norm_tensors(self.norm), *rope_tensors(self.rope))

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (mask_numbers(self.mask), self.q_start, self.scale, self.return_lse, *norm_attributes(self.norm), style)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> TemporalCall:
        mask, q_start, scale, return_lse, norm, eps, style = attributes
        return cls(
            op,
            grad,
            *cls._unpack(*tensors[:3]),
            build_mask(mask),
            q_start,
            tensors[3],
            scale,
            build_norm(tensors[4:8], norm, eps),
            build_rope(tensors[8:10], style),
            return_lse,
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        lse = self.q.shape[:-1] if self.lse else (0,)
        return empty(self.q, self.q.shape), empty(self.q, lse, lse_dtype(self.q))


@dataclass
class FrameCall(AttentionCall):
    """Video attention; spatial attention is this with ``mask=FrameMask.same_frame()`` and no text."""

    TENSORS: ClassVar[tuple[str, ...]] = (
        *("q", "k?", "v?", "lengths?", *NORM, *ROPE),
        *("text_q?", "text_k?", "text_v?", "text_lengths?"),
        *(f"text_{name}" for name in NORM),
    )
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        *TemporalCall.ATTRIBUTES,
        *("str text_norm", "float text_eps", "bool text_first", "str text_sees"),
    )

    text: QKV | None = None
    text_lengths: Tensor | None = None
    text_norm: QKNorm | None = None
    text_first: bool = False
    text_sees: str = "all"

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            *self._qkv(),
            self.lengths,
            *norm_tensors(self.norm),
            *rope_tensors(self.rope),
            *(self.text or (None, None, None)),
            self.text_lengths,
            *norm_tensors(self.text_norm),
        )

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (
            *(mask_numbers(self.mask), self.q_start, self.scale, self.return_lse, *norm_attributes(self.norm), style),
            *(*norm_attributes(self.text_norm), self.text_first, self.text_sees),
        )

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> FrameCall:
        mask, q_start, scale, return_lse, norm, eps, style, text_norm, text_eps, text_first, text_sees = attributes
        return cls(
            op,
            grad,
            *cls._unpack(*tensors[:3]),
            build_mask(mask),
            q_start,
            tensors[3],
            scale,
            build_norm(tensors[4:8], norm, eps),
            build_rope(tensors[8:10], style),
            return_lse,
            tensors[10:13] if tensors[10] is not None else None,
            tensors[13],
            build_norm(tensors[14:18], text_norm, text_eps),
            text_first,
            text_sees,
        )

    @property
    def rows(self) -> int:
        """Length of the joint sequence of video and text."""
        return self.q.shape[1] * self.q.shape[2] + (0 if self.text is None else self.text[0].shape[1])

    def empty_outputs(self) -> tuple[Tensor, ...]:
        B, _, _, H, D = self.q.shape
        lse = (B, self.rows, H) if self.lse else (0,)
        return empty(self.q, (B, self.rows, H, D)), empty(self.q, lse, lse_dtype(self.q))


@dataclass
class GatedCall(Call):
    """Forward also returns the spatial result and both lse, empty without gradients."""

    TENSORS: ClassVar[tuple[str, ...]] = (
        *("q", "k", "v", "temporal_q", "temporal_k", "temporal_v", "gate", "lengths?"),
        *(*NORM, *(f"temporal_{name}" for name in NORM)),
        *(*ROPE, *(f"temporal_{name}" for name in ROPE)),
    )
    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        *("int[] mask", "float scale"),
        *("str norm", "float eps", "str temporal_norm", "float temporal_eps", "str rope", "str temporal_rope"),
    )
    OUTPUTS: ClassVar[int] = 4
    SAVES_OUTPUTS: ClassVar[bool] = True

    spatial: QKV
    temporal: QKV
    gate: Tensor
    mask: FrameMask
    lengths: Tensor | None
    scale: float
    norm: tuple[QKNorm | None, QKNorm | None]
    rope: tuple[Rope | None, Rope | None]

    @property
    def main(self) -> Tensor:
        return self.spatial[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        norms = (x for norm in self.norm for x in norm_tensors(norm))
        ropes = (x for rope in self.rope for x in rope_tensors(rope))
        return (*self.spatial, *self.temporal, self.gate, self.lengths, *norms, *ropes)

    def attributes(self) -> tuple[Any, ...]:
        norms = (x for norm in self.norm for x in norm_attributes(norm))
        styles = (rope.style if rope is not None else "" for rope in self.rope)
        return (mask_numbers(self.mask), self.scale, *norms, *styles)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> GatedCall:
        mask, scale, norm, eps, temporal_norm, temporal_eps, style, temporal_style = attributes
        return cls(
            op,
            grad,
            tensors[:3],
            tensors[3:6],
            tensors[6],
            build_mask(mask),
            tensors[7],
            scale,
            (build_norm(tensors[8:12], norm, eps), build_norm(tensors[12:16], temporal_norm, temporal_eps)),
            (build_rope(tensors[16:18], style), build_rope(tensors[18:20], temporal_style)),
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        q = self.main
        kept, lse = (q.shape, q.shape[:-1]) if self.grad else ((0,), (0,))
        f32 = lse_dtype(q)
        return empty(q, q.shape), empty(q, kept), empty(q, lse, f32), empty(q, lse, f32)


@dataclass
class CrossCall(Call):
    """q ``(B, T, S, H, D)``, k and v ``(B, L, G, D)`` or ``(B, T, L, G, D)``, lengths ``(B,)`` or ``(B, T)``."""

    TENSORS: ClassVar[tuple[str, ...]] = ("q", "k", "v", "lengths?", *NORM)
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("float scale", "bool return_lse", *NORM_ATTRIBUTES)
    OUTPUTS: ClassVar[int] = 2
    SAVES_OUTPUTS: ClassVar[bool] = True

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    scale: float
    norm: QKNorm | None
    return_lse: bool

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.k.numel() == 0

    @property
    def lse(self) -> bool:
        """Forward is to write lse: asked for, or needed by backward."""
        return self.return_lse or self.grad

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, self.v, self.lengths, *norm_tensors(self.norm))

    def attributes(self) -> tuple[Any, ...]:
        return (self.scale, self.return_lse, *norm_attributes(self.norm))

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> CrossCall:
        scale, return_lse, norm, eps = attributes
        q, k, v, lengths = tensors[:4]
        return cls(op, grad, q, k, v, lengths, scale, build_norm(tensors[4:8], norm, eps), return_lse)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        lse = self.q.shape[:-1] if self.lse else (0,)
        return empty(self.q, self.q.shape), empty(self.q, lse, lse_dtype(self.q))


@dataclass
class QKNormRopeCall(Call):
    TENSORS: ClassVar[tuple[str, ...]] = ("q", "k", *NORM, *ROPE)
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("SymInt frame_start", *NORM_ATTRIBUTES, *ROPE_ATTRIBUTES)
    OUTPUTS: ClassVar[int] = 2

    q: Tensor
    k: Tensor
    norm: QKNorm | None
    rope: Rope | None
    frame_start: int

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, *norm_tensors(self.norm), *rope_tensors(self.rope))

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (self.frame_start, *norm_attributes(self.norm), style)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> QKNormRopeCall:
        frame_start, norm, eps, style = attributes
        return cls(
            op,
            grad,
            tensors[0],
            tensors[1],
            build_norm(tensors[2:6], norm, eps),
            build_rope(tensors[6:8], style),
            frame_start,
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        return empty(self.q, self.q.shape), empty(self.k, self.k.shape)
