"""Temporal attention on the CPU engine: csrc/cpu/temporal_attention.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.ops.call import empty_like, mask_numbers
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, NormRope, capsule, native, why_not

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


def _arguments(c: TemporalCall, out: Tensor, lse: Tensor | None, shared: NormRope) -> tuple:
    q, k, v, _ = c.qkv
    lengths = None if c.lengths is None else c.lengths.tolist()
    return (
        *(capsule(q), capsule(k), capsule(v), capsule(out), capsule(lse)),
        *(lengths, mask_numbers(c.mask), c.q_start, c.scale, shared.norm, shared.rope, torch.get_num_threads()),
    )


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    native().temporal_attention_forward(*_arguments(c, out, lse, NormRope(c.norm, c.rope)))


def _forward(c: TemporalCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


# Gradients that need that of q, k or v.
_NEEDED_BY = {
    "q": {"q", "q_weight", "q_bias", "cos", "sin"},
    "k": {"k", "k_weight", "k_bias", "cos", "sin"},
    "v": {"v"},
}


def run_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    """Gradients by the names of ``c.NAMES``."""
    out, lse = outputs
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dout, dlse = unit_stride(dout), None if dlse is None else unit_stride(dlse)
    found: Gradients = {}

    # Gradients of q, k and v; also where only a weight behind them wants one.
    if c.packed is not None:
        found["q"] = torch.empty(c.packed.shape, dtype=c.packed.dtype)
        gradients: tuple[Tensor | None, ...] = found["q"].unbind(3)
    else:
        for name, x in zip("qkv", (c.q, c.k, c.v)):
            if wanted & _NEEDED_BY[name]:
                found[name] = empty_like(x)
        gradients = tuple(found.get(name) for name in "qkv")

    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    table = None if c.rope is None or not wanted & {"cos", "sin"} else c.rope.cos
    per_position = table is not None and table.shape[1] > 1
    units = c.q.shape[2] if per_position else c.q.shape[0] * c.q.shape[2]
    sums = any(name in wanted for name in names) or table is not None
    items = min(units, SUM_PARTS) if sums else min(units, max(64 * torch.get_num_threads(), units // 64))
    weights: list[Tensor | None] = [None] * 4
    if c.norm is not None:
        given = (c.norm.q_weight, c.norm.k_weight, c.norm.q_bias, c.norm.k_bias)
        for i, (name, weight) in enumerate(zip(names, given)):
            if name in wanted and weight is not None:
                weights[i] = torch.zeros(items, weight.numel())
    tables: list[Tensor | None] = [None, None]
    if table is not None:
        shape = (table.shape[0], table.shape[1], table.shape[2] if table.ndim == 4 else 1, table.shape[-1])
        tables = [torch.zeros(1 if per_position else items, *shape) for _ in range(2)]

    shared = NormRope(c.norm, c.rope)
    native().temporal_attention_backward(
        *_arguments(c, out, lse, shared),
        *(capsule(x) for x in (dout, dlse, *gradients)),
        items,
        [capsule(x) for x in weights],
        *(capsule(x) for x in tables),
    )
    for name, part in zip(names, weights):
        if part is not None:
            found[name] = part.sum(0, dtype=torch.float64)
    for name, part in zip(("cos", "sin"), tables):
        if part is not None and table is not None:
            found[name] = part.sum(0, dtype=torch.float64).reshape(table.shape)
    return found


def _why_not(c: TemporalCall) -> str | None:
    return why_not(c.qkv.q, c.qkv.q.shape[-1])


TEMPORAL = Implementation(_forward, run_backward, _why_not)
