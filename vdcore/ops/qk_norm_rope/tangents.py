"""Tangents of the fused QK-norm and rope."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.norm import QKNorm, compute_dtype, normalized, normalized_tangent
from vdcore.rope import Rope

Dual = tuple[Tensor, "Tensor | None"]  # a tensor and its tangent; None: 0


def qk_norm_rope(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of q ``(B, T, S, H, D)`` and k ``(B, T, S, G, D)``, normed and rotated."""
    rope = call.rope
    if rope is not None and rope.cos.shape[0] != 1:
        rope = Rope(rope.cos[call.frame_start :], rope.sin[call.frame_start :], rope.style)
        given = {name: x[call.frame_start :] if name in ("cos", "sin") else x for name, x in given.items()}
    duals = [norm_rope((getattr(call, x), given.get(x)), x, call.norm, rope, 0, given) for x in "qk"]
    return tuple(  # type: ignore[return-value]
        torch.zeros_like(x, dtype=call.q.dtype) if dx is None else dx.to(call.q.dtype) for x, dx in duals
    )


def norm_rope(
    dual: Dual,
    side: str,
    norm: QKNorm | None,
    rope: Rope | None,
    start: int,
    given: dict[str, Tensor],
    prefix: str = "",
) -> Dual:
    """Queries or keys ``(B, T, S, heads, D)`` as the scores see them, float32 at least, and their tangent.

    Args:
        side: ``"q"`` or ``"k"``.
        start: row of the rope table that the first frame uses.
        given: tangents of weights and tables, named as the call names them, with the prefix.
    """
    dtype = compute_dtype(dual[0].dtype)
    given = {name.removeprefix(prefix): x.to(dtype) for name, x in given.items() if name.startswith(prefix)}
    x, dx = dual[0].to(dtype), None if dual[1] is None else dual[1].to(dtype)
    if norm is not None:
        x, dx = _norm((x, dx), side, norm, given)
    return (x, dx) if rope is None else _rotate((x, dx), rope, start, given.get("cos"), given.get("sin"))


def _norm(dual: Dual, side: str, norm: QKNorm, given: dict[str, Tensor]) -> Dual:
    (x, dx), shape, dtype = dual, dual[0].shape, dual[0].dtype
    if norm.over == "all":
        x, dx = x.flatten(-2), None if dx is None else dx.flatten(-2)
    weight, bias = (norm.q_weight, norm.q_bias) if side == "q" else (norm.k_weight, norm.k_bias)
    y, factor = normalized(x, norm.kind, norm.eps)
    dy = None if dx is None else normalized_tangent(y, factor, dx, norm.kind)
    if dy is not None and weight is not None:
        dy = dy * weight.to(dtype)
    if f"{side}_weight" in given:
        dy = y * given[f"{side}_weight"] + (0 if dy is None else dy)
    if f"{side}_bias" in given:
        dy = given[f"{side}_bias"].expand_as(y) + (0 if dy is None else dy)
    y = y if weight is None else y * weight.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    return y.reshape(shape), None if dy is None else dy.reshape(shape)


def _rotate(dual: Dual, rope: Rope, start: int, dcos: Tensor | None, dsin: Tensor | None) -> Dual:
    """A rotation is linear in x, and in the table."""
    x, dx = dual
    turned = None if dx is None else rope.rotate(dx, start)
    if dcos is not None or dsin is not None:
        cos, sin = (torch.zeros_like(y) if dy is None else dy for y, dy in ((rope.cos, dcos), (rope.sin, dsin)))
        channels = 2 * rope.cos.shape[-1]
        moved = Rope(cos, sin, rope.style).rotate(x[..., :channels], start)
        moved = F.pad(moved, (0, x.shape[-1] - channels))  # the other channels do not turn
        turned = moved if turned is None else turned + moved
    return rope.rotate(x, start), turned
