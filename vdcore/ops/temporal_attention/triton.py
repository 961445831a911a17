"""Temporal attention: kernels/temporal_attention.py, with '_backward' and '_long' beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import TemporalCall
from vdcore.backends.triton._common import frames, qkv_gradients, unit, why_not, why_not_head, why_not_norm


def _temporal_why_not(c: TemporalCall) -> str | None:
    return why_not(c.q) or why_not_head(c.q) or why_not_norm(c.q, c.k, c.norm)


def _temporal(c: TemporalCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.temporal_attention import temporal_forward

    out, lse = c.empty_outputs()
    temporal_forward(c.q, c.k, c.v, out, lse if c.lse else None, norm=c.norm, rope=c.rope, scale=c.scale, **frames(c))
    return out, lse


def _temporal_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore.kernels.temporal_attention_backward import temporal_backward

    out, lse = outputs
    dout = torch.zeros_like(out) if grads[0] is None else unit(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    found, gradients = qkv_gradients(c)
    more = temporal_backward(
        *(c.q, c.k, c.v, out, lse, dout, dlse, gradients, wanted),
        **{"norm": c.norm, "rope": c.rope, "scale": c.scale, **frames(c)},
    )
    return {**found, **more}


OPERATORS = {"temporal_attention": Implementation(_temporal, _temporal_backward, _temporal_why_not)}
