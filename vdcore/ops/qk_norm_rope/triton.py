"""Norm and rope alone: kernels/qk_norm_rope.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import QKNormRopeCall
from vdcore.backends.triton._common import norm_rope_gradients, why_not, why_not_norm


def _qk_norm_rope_why_not(c: QKNormRopeCall) -> str | None:
    return why_not(c.q) or why_not_norm(c.q, c.k, c.norm)


def _qk_norm_rope(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.qk_norm_rope import norm_rope_forward

    return tuple(norm_rope_forward(x, c.norm, role, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


def _qk_norm_rope_backward(
    c: QKNormRopeCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    found: Gradients = {}
    for role, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1])):
        norm_rope_gradients(found, x, dy, c.norm, role, c.rope, c.frame_start, wanted)
    return found


OPERATORS = {"qk_norm_rope": Implementation(_qk_norm_rope, _qk_norm_rope_backward, _qk_norm_rope_why_not)}
