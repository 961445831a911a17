"""QK-norm and rope on the CPU engine: csrc/cpu/qk_norm_rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends._native import native
from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import QKNormRopeCall
from vdcore.backends.cpu._arguments import SUM_PARTS, NormRope, capsule, unit_stride, why_not

_WEIGHTS = ("q_weight", "k_weight", "q_bias", "k_bias")


def run_forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    outputs = c.empty_outputs()
    shared = NormRope(c.norm, c.rope)
    native().qk_norm_rope_forward(
        *map(capsule, (c.q, c.k, *outputs)), c.frame_start, shared.norm, shared.rope, torch.get_num_threads()
    )
    return outputs


def run_backward(
    c: QKNormRopeCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    found: Gradients = {
        name: torch.zeros(x.shape, dtype=x.dtype) if dy is None else torch.empty(x.shape, dtype=x.dtype)
        for name, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1]))
    }
    table = None if c.rope is None or not wanted & {"cos", "sin"} else c.rope.cos
    per_position = table is not None and table.shape[1] > 1
    B, T, S = c.q.shape[:3]
    units = S if per_position else B * T * S
    sums = bool(wanted & {*_WEIGHTS, "cos", "sin"})
    items = min(units, SUM_PARTS if sums else max(SUM_PARTS, 8 * torch.get_num_threads()))
    weights: list[Tensor | None] = [None] * 4
    if c.norm is not None:
        given = (c.norm.q_weight, c.norm.k_weight, c.norm.q_bias, c.norm.k_bias)
        for i, (name, weight) in enumerate(zip(_WEIGHTS, given)):
            if name in wanted and weight is not None:
                weights[i] = torch.zeros(items, weight.numel())
    tables: list[Tensor | None] = [None, None]
    if table is not None:
        shape = (table.shape[0], table.shape[1], table.shape[2] if table.ndim == 4 else 1, table.shape[-1])
        tables = [torch.zeros(1 if per_position else items, *shape) for _ in range(2)]

    shared = NormRope(c.norm, c.rope)
    native().qk_norm_rope_backward(
        *map(capsule, (c.q, c.k, *(None if dy is None else unit_stride(dy) for dy in grads), found["q"], found["k"])),
        *(c.frame_start, shared.norm, shared.rope, torch.get_num_threads(), items, [capsule(x) for x in weights]),
        *map(capsule, tables),
    )
    for name, part in zip(_WEIGHTS, weights):
        if part is not None:
            found[name] = part.sum(0, dtype=torch.float64)
    for name, part in zip(("cos", "sin"), tables):
        if part is not None and table is not None:
            found[name] = part.sum(0, dtype=torch.float64).reshape(table.shape)
    return found


def _why_not(c: QKNormRopeCall) -> str | None:
    return why_not(c.q.device.type, c.q.dtype)


OPERATORS = {"qk_norm_rope": Implementation(run_forward, run_backward, _why_not)}
