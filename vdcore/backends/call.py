"""What a backend is asked to do: one plain record per operator family, checked and with all defaults filled in.

A record also says how it crosses a torch operator's boundary, which takes tensors and numbers only: ``tensors()`` and
``attributes()`` take it apart in the order of ``TENSORS`` and ``ATTRIBUTES``, ``build()`` puts it together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope

QKV = tuple[Tensor, Tensor, Tensor]


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


def _empty(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


# ---- QKNorm and Rope across the boundary ----

NORM = ("q_weight?", "k_weight?", "q_bias?", "k_bias?")
ROPE = ("cos?", "sin?")
NORM_ATTRIBUTES = ("str norm", "float eps")
ROPE_ATTRIBUTES = ("str rope",)


def _norm_tensors(norm: QKNorm | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)


def _norm_attributes(norm: QKNorm | None) -> tuple[str, float]:
    return ("", 0.0) if norm is None else (f"{norm.kind}/{norm.over}", norm.eps)


def _build_norm(tensors: tuple[Any, ...], name: str, eps: float) -> QKNorm | None:
    if not name:
        return None
    kind: Any
    over: Any
    kind, over = name.split("/")
    q_weight, k_weight, q_bias, k_bias = tensors
    return QKNorm(q_weight, k_weight, kind, over, eps, q_bias, k_bias)


def _rope_tensors(rope: Rope | None) -> tuple[Tensor | None, ...]:
    return (None, None) if rope is None else (rope.cos, rope.sin)


def _build_rope(tensors: tuple[Any, ...], style: Any) -> Rope | None:
    return Rope(tensors[0], tensors[1], style) if style else None


_UNBOUNDED = 2**31 - 1  # no video has more frames; keeps products of two such numbers inside int64


def mask_numbers(mask: FrameMask) -> list[int]:
    past, future = (-1 if x is None or x >= _UNBOUNDED else x for x in (mask.past, mask.future))
    return [past, future, min(mask.chunk, _UNBOUNDED), min(mask.sink, _UNBOUNDED)]


def _build_mask(numbers: list[int]) -> FrameMask:
    past, future, chunk, sink = numbers
    return FrameMask(None if past < 0 else past, None if future < 0 else future, chunk, sink)


# ---- Attention ----


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
        return (*self._qkv(), self.lengths, *_norm_tensors(self.norm), *_rope_tensors(self.rope))

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (mask_numbers(self.mask), self.q_start, self.scale, self.return_lse, *_norm_attributes(self.norm), style)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> TemporalCall:
        mask, q_start, scale, return_lse, norm, eps, style = attributes
        return cls(
            op,
            grad,
            *cls._unpack(*tensors[:3]),
            _build_mask(mask),
            q_start,
            tensors[3],
            scale,
            _build_norm(tensors[4:8], norm, eps),
            _build_rope(tensors[8:10], style),
            return_lse,
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        lse = self.q.shape[:-1] if self.lse else (0,)
        return _empty(self.q, self.q.shape), _empty(self.q, lse, lse_dtype(self.q))


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


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
            *_norm_tensors(self.norm),
            *_rope_tensors(self.rope),
            *(self.text or (None, None, None)),
            self.text_lengths,
            *_norm_tensors(self.text_norm),
        )

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (
            *(mask_numbers(self.mask), self.q_start, self.scale, self.return_lse, *_norm_attributes(self.norm), style),
            *(*_norm_attributes(self.text_norm), self.text_first, self.text_sees),
        )

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> FrameCall:
        mask, q_start, scale, return_lse, norm, eps, style, text_norm, text_eps, text_first, text_sees = attributes
        return cls(
            op,
            grad,
            *cls._unpack(*tensors[:3]),
            _build_mask(mask),
            q_start,
            tensors[3],
            scale,
            _build_norm(tensors[4:8], norm, eps),
            _build_rope(tensors[8:10], style),
            return_lse,
            tensors[10:13] if tensors[10] is not None else None,
            tensors[13],
            _build_norm(tensors[14:18], text_norm, text_eps),
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
        return _empty(self.q, (B, self.rows, H, D)), _empty(self.q, lse, lse_dtype(self.q))


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
        norms = (x for norm in self.norm for x in _norm_tensors(norm))
        ropes = (x for rope in self.rope for x in _rope_tensors(rope))
        return (*self.spatial, *self.temporal, self.gate, self.lengths, *norms, *ropes)

    def attributes(self) -> tuple[Any, ...]:
        norms = (x for norm in self.norm for x in _norm_attributes(norm))
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
            _build_mask(mask),
            tensors[7],
            scale,
            (_build_norm(tensors[8:12], norm, eps), _build_norm(tensors[12:16], temporal_norm, temporal_eps)),
            (_build_rope(tensors[16:18], style), _build_rope(tensors[18:20], temporal_style)),
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        q = self.main
        kept, lse = (q.shape, q.shape[:-1]) if self.grad else ((0,), (0,))
        f32 = lse_dtype(q)
        return _empty(q, q.shape), _empty(q, kept), _empty(q, lse, f32), _empty(q, lse, f32)


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
        return (self.q, self.k, self.v, self.lengths, *_norm_tensors(self.norm))

    def attributes(self) -> tuple[Any, ...]:
        return (self.scale, self.return_lse, *_norm_attributes(self.norm))

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> CrossCall:
        scale, return_lse, norm, eps = attributes
        q, k, v, lengths = tensors[:4]
        return cls(op, grad, q, k, v, lengths, scale, _build_norm(tensors[4:8], norm, eps), return_lse)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        lse = self.q.shape[:-1] if self.lse else (0,)
        return _empty(self.q, self.q.shape), _empty(self.q, lse, lse_dtype(self.q))


# ---- Norm and rope alone ----


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
        return (self.q, self.k, *_norm_tensors(self.norm), *_rope_tensors(self.rope))

    def attributes(self) -> tuple[Any, ...]:
        style = self.rope.style if self.rope is not None else ""
        return (self.frame_start, *_norm_attributes(self.norm), style)

    @classmethod
    def build(cls, op: str, grad: bool, tensors: tuple[Any, ...], attributes: tuple[Any, ...]) -> QKNormRopeCall:
        frame_start, norm, eps, style = attributes
        return cls(
            op,
            grad,
            tensors[0],
            tensors[1],
            _build_norm(tensors[2:6], norm, eps),
            _build_rope(tensors[6:8], style),
            frame_start,
        )

    def empty_outputs(self) -> tuple[Tensor, ...]:
        return _empty(self.q, self.q.shape), _empty(self.k, self.k.shape)


# ---- Patches ----


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
        return (_empty(self.video, (B, T // pt, (H // ph) * (W // pw), E)),)


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
        return (_empty(self.tokens, (self.tokens.shape[0], self.channels, T * pt, H * ph, W * pw)),)


# ---- Adaptive norm ----


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
        return (_empty(self.x, self.x.shape),)


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
        return (_empty(self.residual, self.residual.shape),)
