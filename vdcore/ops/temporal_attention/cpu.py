"""Temporal attention on the CPU engine: csrc/cpu/temporal_attention.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.call import empty_like, mask_numbers
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, capsule, native, norm_rope, why_not
from vdcore.ops.qk_norm_rope.cpu import SharedGradients

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


def _arguments(c: TemporalCall, out: Tensor, lse: Tensor | None) -> dict[str, Any]:
    """What both directions of the engine take."""
    q, k, v, _ = c.qkv
    return {
        "q": capsule(q),
        "k": capsule(k),
        "v": capsule(v),
        "out": capsule(out),
        "lse": capsule(lse),
        "lengths": None if c.lengths is None else c.lengths.tolist(),
        "mask": mask_numbers(c.mask),
        "q_start": c.q_start,
        "scale": c.scale,
        **norm_rope(c.norm, c.rope),
        "threads": torch.get_num_threads(),
    }


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    native().temporal_attention_forward(**_arguments(c, out, lse))


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
    dq, dk, dv = gradients

    sums = SharedGradients(c.norm, c.rope, wanted)
    units = c.q.shape[2] if sums.per_position else c.q.shape[0] * c.q.shape[2]
    parts = min(units, SUM_PARTS if sums.wanted else max(64 * torch.get_num_threads(), units // 64))
    native().temporal_attention_backward(
        **_arguments(c, out, lse),
        dout=capsule(dout),
        dlse=capsule(dlse),
        dq=capsule(dq),
        dk=capsule(dk),
        dv=capsule(dv),
        **sums.arguments(parts),
    )
    return found | sums.total()


def _why_not(c: TemporalCall) -> str | None:
    return why_not(c.qkv.q, c.qkv.q.shape[-1])


TEMPORAL = Implementation(_forward, run_backward, _why_not)
