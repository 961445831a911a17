"""Temporal attention: kernels/temporal_attention.py, with '_backward' and '_long' beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.qk_norm_rope.triton import why_not_norm
from vdcore.ops.triton import qkv_gradients, why_not, why_not_head

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


def _temporal_why_not(c: TemporalCall) -> str | None:
    return why_not(c.q) or why_not_head(c.q) or why_not_norm(c.q, c.k, c.norm)


def _frames(c: TemporalCall) -> dict[str, Any]:
    return {"mask": c.mask, "q_start": c.q_start, "lengths": c.lengths}


def _temporal(c: TemporalCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.temporal_attention.forward import temporal_forward

    out, lse = c.empty_outputs()
    temporal_forward(c.q, c.k, c.v, out, lse, norm=c.norm, rope=c.rope, scale=c.scale, **_frames(c))
    return out, lse


def _temporal_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.temporal_attention.backward import temporal_backward

    out, lse = outputs
    dout = torch.zeros_like(out) if grads[0] is None else unit_stride(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    found, gradients = qkv_gradients(c)
    more = temporal_backward(
        *(c.q, c.k, c.v, out, lse, dout, dlse, gradients, wanted),
        **{"norm": c.norm, "rope": c.rope, "scale": c.scale, **_frames(c)},
    )
    return {**found, **more}


TEMPORAL = Implementation(_temporal, _temporal_backward, _temporal_why_not)
