"""Norm and rope alone, and before and after kernels that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.triton import why_not, why_not_norm
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.qk_norm_rope import QKNormRopeCall


def normalized_rotated(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None = None, start: int = 0) -> Tensor:
    """Queries (role ``"q"``) or keys after norm and RoPE."""
    from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward

    return x if norm is None and rope is None else norm_rope_forward(x, norm, role, rope, start)


def norm_rope_gradients(
    found: Gradients,
    x: Tensor,
    dy: Tensor | None,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    start: int,
    wanted: frozenset[str],
    *,
    prefix: str = "",
    keep: bool = True,
    **where: Any,
) -> None:
    """Adds what the norm and rope of q or k give their tensors, under the names of the call; x's too with ``keep``."""
    from vdcore_kernels.qk_norm_rope.backward import norm_rope_backward

    names = {"weight": f"{prefix}{role}_weight", "bias": f"{prefix}{role}_bias"}
    names |= {"cos": f"{prefix}cos", "sin": f"{prefix}sin"}
    inner = frozenset(short for short, name in names.items() if name in wanted)
    dy = unit_stride(dy) if dy is not None else torch.zeros_like(x, memory_format=torch.contiguous_format)
    for short, dx in norm_rope_backward(x, dy, norm, role, rope, start, inner, **where).items():
        name = names.get(short, prefix + role)
        if short == "x" and not keep:
            continue
        found[name] = found[name] + dx if short in ("cos", "sin") and name in found else dx


def _why_not(c: QKNormRopeCall) -> str | None:
    return why_not(c.q) or why_not_norm(c.q, c.k, c.norm)


def _forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward

    return tuple(norm_rope_forward(x, c.norm, role, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


def _backward(c: QKNormRopeCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: frozenset[str]) -> Gradients:
    found: Gradients = {}
    for role, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1])):
        norm_rope_gradients(found, x, dy, c.norm, role, c.rope, c.frame_start, wanted)
    return found


NORM_ROPE = Implementation(_forward, _backward, _why_not)
