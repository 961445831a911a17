"""What of a model's videos is its attention across frames' doing: its weight, and its window, changed at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vdcore.mask import FrameMask
from vdcore.models import VDiT
from vdcore.models.attention import Context, FullAttention, GatedAttention, TemporalAttention

ACROSS = (TemporalAttention, FullAttention, GatedAttention)


@contextmanager
def across_frames(model: VDiT, *, weight: float = 1.0, mask: FrameMask | None = None) -> Iterator[VDiT]:
    """Within it, the model's attention across frames counts ``weight`` times, or sees the frames of another mask.

    With A what a layer returns, and A_0 the same where every frame sees itself alone, it returns
    ``A_0 + weight (A - A_0)``: 0 is a model without attention across frames, above 1 it holds frames together more
    than it was trained to.

    Args:
        weight: of attention across frames.
        mask: in place of the model's own.

    Raises:
        ValueError: if the model has no layer that looks across frames.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, ACROSS)]
    if not layers:
        raise ValueError("across_frames: model must have attention across frames, got one whose blocks have none")
    for layer in layers:
        layer.forward = _changed(layer, weight, mask)  # type: ignore[method-assign]
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward


def _changed(layer: nn.Module, weight: float, mask: FrameMask | None) -> Callable[..., Tensor]:
    whole = layer.forward

    def forward(x: Tensor, context: Context, ring: Any = None) -> Tensor:
        found = whole(x, context if mask is None else replace(context, mask=mask), ring)
        if weight == 1.0:
            return found
        alone = whole(x, replace(context, mask=FrameMask.same_frame()), ring)
        return alone + weight * (found - alone)

    return forward
