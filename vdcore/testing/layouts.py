"""The same values at other places in memory. What lies around them is NaN, so that reading it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _around(shape: list[int], x: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    return torch.zeros(shape, dtype=x.dtype, device=x.device)


def _stored_as(x: Tensor, order: list[int]) -> Tensor:
    """x with its axes stored in the given order, outermost first."""
    back = [order.index(axis) for axis in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def reversed_axes(x: Tensor) -> Tensor:
    """All axes but the innermost stored the other way round."""
    return _stored_as(x, [*range(x.ndim - 1)][::-1] + [x.ndim - 1])


def heads_first(x: Tensor) -> Tensor:
    """The axis before the innermost stored second: (B, T, S, H, D) as (B, H, T, S, D)."""
    if x.ndim < 3:
        return reversed_axes(x)
    return _stored_as(x, [0, x.ndim - 2, *range(1, x.ndim - 2), x.ndim - 1])


def innermost_apart(x: Tensor) -> Tensor:
    """Innermost stride other than 1: the last two axes stored swapped."""
    if x.ndim < 2:
        return _around([x.shape[0], 2], x)[:, 0].copy_(x)
    return _stored_as(x, [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])


def padded_rows(x: Tensor) -> Tensor:
    """Rows with room behind them."""
    whole = _around([*x.shape[:-1], x.shape[-1] + 5], x)
    return whole[..., : x.shape[-1]].copy_(x)


def joint_sequence(x: Tensor) -> Tensor:
    """A slice of a longer axis 1, as video is of a joint sequence."""
    if x.ndim < 2:
        return _around([x.shape[0] + 3], x)[2:-1].copy_(x)
    whole = _around([x.shape[0], x.shape[1] + 3, *x.shape[2:]], x)
    return whole[:, 2 : 2 + x.shape[1]].copy_(x)


def every_second(x: Tensor) -> Tensor:
    """Every second entry of the outermost axis."""
    whole = _around([2 * x.shape[0] + 1, *x.shape[1:]], x)
    return whole[1::2].copy_(x)


def packed(x: Tensor) -> Tensor:
    """One of three, as q is of a QKV projection: (B, T, S, H, D) inside (B, T, S, 3, H, D)."""
    axis = max(x.ndim - 2, 0)
    whole = _around([*x.shape[:axis], 3, *x.shape[axis:]], x)
    return whole.select(axis, 1).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        contiguous,
        reversed_axes,
        heads_first,
        innermost_apart,
        padded_rows,
        joint_sequence,
        every_second,
        packed,
    )
}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to x in one of :data:`LAYOUTS`."""
    return LAYOUTS[layout](x.detach()) if x.ndim else x.detach().clone()
