"""What a video diffusion transformer is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from vdcore.grid_mask import GridMask
from vdcore.mask import FrameMask

Mask = FrameMask | GridMask | tuple[tuple[int, FrameMask | GridMask], ...]
ATTENTION = ("spatial", "factorized", "alternating", "gated", "full")
MODULATION = ("zero", "single")
POSITION = ("sincos", "rope", "sincos+rope")
GATE = ("scalar", "head", "token")


@dataclass(frozen=True)
class VDiTConfig:
    """A video DiT (Peebles and Xie 2023; Ma et al. 2024, Latte).

    Args:
        in_channels: of the video.
        out_channels: of the prediction; None: ``in_channels``.
        patch: ``(pt, ph, pw)``, video to tokens.
        width: channels C of a token; ``heads`` divides it.
        depth: blocks.
        heads: H; ``head_dim = width // heads``.
        kv_heads: key and value heads G of self-attention, which divide H; None: H.
        mlp_ratio: hidden channels of the MLP over ``width``.
        attention: how tokens see one another. ``"spatial"``: inside their frame only, an image model that takes clips;
            ``"factorized"``: inside the frame, then across frames at their position; ``"alternating"``: the two in
            blocks of their own, each with its MLP (Latte); ``"gated"``: both side by side,
            ``a * spatial + (1 - a) * temporal``; ``"full"``: all tokens of the visible frames.
        mask: which frames a frame sees, of temporal attention, or of full attention; full attention may also have a
            ``GridMask``, what a token sees, or pairs ``(heads, mask)`` of either, one for each group of heads.
        modulation: ``"zero"``: AdaLN-Zero, each block has its own projection of the condition (DiT); ``"single"``:
            adaLN-single, one projection for all and a table per block (PixArt-alpha, Chen et al. 2023).
        position: ``"sincos"``: added to the tokens; ``"rope"``: axial rotation of queries and keys; ``"sincos+rope"``:
            added over space, rotated over time (STDiT3), or with full attention over all three axes: what the tokens
            carry says where in the picture they are, by which a model remembers a place.
        base_size: with sincos, rows (columns) ``i`` of ``n`` have the position ``i * base_size / n``; None: ``i``.
        rope_theta: base of the rotary frequencies.
        beside: with rope, biases of queries and keys initialize attention to the neighboring token along every axis:
            see :func:`vdcore.models.position.neighbor_bias`.
        qk_norm: RMS norm per head on queries and keys.
        text_width: channels of text tokens; None: no text. Text comes by cross-attention.
        temporal_cross: with ``"alternating"``, temporal blocks attend to the text too (STDiT3).
        classes: number of class labels; None: no labels. Label ``classes`` stands for "no class".
        gate: with ``"gated"``, what ``a`` is learned for: the block, each head, or each token from its content.
        checkpoint: in training keep only what attention returned, and the input of each block; recompute the rest.

    Raises:
        ValueError: if a value is not one of these, or sizes do not divide.
    """

    in_channels: int = 4
    out_channels: int | None = None
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 384
    depth: int = 12
    heads: int = 6
    kv_heads: int | None = None
    mlp_ratio: float = 4.0
    attention: str = "factorized"
    mask: Mask = FrameMask()
    modulation: str = "zero"
    position: str = "sincos"
    base_size: float | None = None
    rope_theta: float = 1e4
    beside: bool = False
    qk_norm: bool = False
    text_width: int | None = None
    temporal_cross: bool = False
    classes: int | None = None
    gate: str = "scalar"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        choices = {"attention": ATTENTION, "modulation": MODULATION, "position": POSITION, "gate": GATE}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"VDiTConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("in_channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"VDiTConfig: {name} must be at least 1, got {getattr(self, name)}")
        if len(self.patch) != 3 or any(p < 1 for p in self.patch):
            raise ValueError(f"VDiTConfig: patch must be three sizes (pt, ph, pw) of at least 1, got {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"VDiTConfig: heads must divide width = {self.width}, got {self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"VDiTConfig: kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        if self.position != "rope" and self.width % 4:
            raise ValueError(f"VDiTConfig: width must be a multiple of 4 with sincos, got {self.width}")
        if self.position != "sincos" and (self.head_dim % 2 or (self.attention == "full" and self.head_dim < 6)):
            expected = "even, and at least 6 with full attention"
            raise ValueError(f"VDiTConfig: width / heads must be {expected}, for rope, got {self.head_dim}")
        if self.beside and self.position == "sincos":
            raise ValueError("VDiTConfig: beside needs position rope or sincos+rope, got sincos")
        self._check_mask()

    def _check_mask(self) -> None:
        pairs = self.mask if isinstance(self.mask, tuple) else ((self.heads, self.mask),)
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], (FrameMask, GridMask))):
                expected = "a FrameMask, a GridMask, or pairs (heads, mask) of them"
                raise TypeError(f"VDiTConfig: mask must be {expected}, got {type(self.mask).__name__}")
        if isinstance(self.mask, FrameMask):
            return
        if self.attention != "full":
            raise ValueError(f"VDiTConfig: mask must be one FrameMask with {self.attention} attention, got another")
        counts, each = [count for count, _ in pairs], self.heads // (self.kv_heads or self.heads)
        if sum(counts) != self.heads or any(count < 1 or count % each for count in counts):
            expected = f"multiples of {each} heads, {self.heads} in all"
            raise ValueError(f"VDiTConfig: mask must be of {expected}, got {counts}")

    @property
    def frame_mask(self) -> FrameMask:
        """The mask, of models that have one in frames alone."""
        if not isinstance(self.mask, FrameMask):
            raise ValueError(f"VDiTConfig: mask must be one FrameMask here, got {type(self.mask).__name__}")
        return self.mask

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def channels_out(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    def parts(self, index: int) -> tuple[str, ...]:
        """The layers of block ``index``, in order."""
        text = ("cross",) if self.text_width is not None else ()
        if self.attention == "factorized":
            return ("spatial", "temporal", *text, "mlp")
        if self.attention == "alternating":
            if index % 2:
                return ("temporal", *(text if self.temporal_cross else ()), "mlp")
            return ("spatial", *text, "mlp")
        return (self.attention, *text, "mlp")

    def to_json(self) -> str:
        """As text, for a checkpoint's metadata."""
        return json.dumps({**asdict(self), "mask": _values_of(self.mask)})

    @staticmethod
    def from_json(text: str) -> VDiTConfig:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return VDiTConfig(**{**values, "mask": _mask_of(values["mask"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            names = ", ".join(field.name for field in fields(VDiTConfig))
            raise ValueError(
                f"VDiTConfig: expected JSON with the fields {names}, got {text[:80]!r} ({error})"
            ) from None


def _values_of(mask: Any) -> Any:
    """A mask as JSON has it."""
    if isinstance(mask, tuple):
        return [[count, _values_of(one)] for count, one in mask]
    values = {field.name: getattr(mask, field.name) for field in fields(mask) if field.init}
    return values if isinstance(mask, FrameMask) else {**values, "frames": _values_of(mask.frames)}


def _mask_of(values: Any) -> Any:
    """What :func:`_values_of` made."""
    if isinstance(values, list):
        return tuple((count, _mask_of(one)) for count, one in values)
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return GridMask(**{**given, "frames": _mask_of(given["frames"])}) if "frames" in given else FrameMask(**given)
