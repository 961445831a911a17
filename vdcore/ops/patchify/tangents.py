"""Tangents of 3D patch embedding and its inverse: linear in the video, the weight and the bias, each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vdcore.ops.patchify import reference


def patchify(call: Any, given: dict[str, Tensor]) -> tuple[Tensor]:
    """``dvideo * weight + video * dweight + dbias``, as :func:`vdcore.patchify` multiplies."""
    return _bilinear(reference.patchify, call.video, call.weight, given, "video")


def unpatchify(call: Any, given: dict[str, Tensor]) -> tuple[Tensor]:
    """``dtokens * weight + tokens * dweight + dbias``, as :func:`vdcore.unpatchify` multiplies."""

    def project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layout = {"channels": call.channels, "patch": call.patch, "grid": call.grid, "order": call.order}
        return reference.unpatchify(tokens, weight, bias, **layout)

    return _bilinear(project, call.tokens, call.weight, given, "tokens")


def _bilinear(
    product: Callable[..., Tensor], x: Tensor, weight: Tensor, given: dict[str, Tensor], name: str
) -> tuple[Tensor]:
    """The tangent of the bias joins the first of the products."""
    dx, dweight, dbias = (given.get(key) for key in (name, "weight", "bias"))
    if dx is None:
        other = weight.new_zeros(weight.shape) if dweight is None else dweight
        return (product(x, other, dbias),)
    out = product(dx, weight, dbias)
    return (out if dweight is None else out + product(x, dweight, None),)
