"""Temporal attention: kernels of its room, the long ones where frames do not fit in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.qk_norm_rope.triton import normalized_rotated
from vdcore.ops.temporal_attention.tangents import qkv_duals
from vdcore.ops.triton import output_gradients, qkv_gradients, why_not, why_not_head, why_not_norm

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


def _temporal_why_not(c: TemporalCall) -> str | None:
    if c.bias is not None:
        return "its kernels know no bias"
    return why_not(c.q) or why_not_head(c.q) or why_not_norm(c.q, c.k, c.norm)


def _arguments(c: TemporalCall) -> dict[str, Any]:
    frames = {"mask": c.mask, "q_start": c.q_start, "lengths": c.lengths}
    return {"norm": c.norm, "rope": c.rope, "sm_scale": c.scale, **frames}


def _temporal(c: TemporalCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.temporal_attention.forward import temporal_forward

    out, lse = c.empty_outputs()
    assert out is not None
    temporal_forward(c.q, c.k, c.v, out, lse, **_arguments(c))
    return out, lse


def _temporal_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.temporal_attention.backward import temporal_backward

    out, lse = outputs
    dout, dlse = output_gradients(out, grads)
    found, gradients = qkv_gradients(c)
    given: dict[str, Any] = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, "gradients": gradients}
    more = temporal_backward(c.q, c.k, c.v, wanted=wanted, **given, **_arguments(c))
    return {**found, **more}


def temporal_tangents(c: TemporalCall, outputs: tuple[Tensor, ...], given: Gradients) -> tuple[Tensor, ...]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
    from vdcore_kernels.temporal_attention import tangents

    q, k = (normalized_rotated(x, c.norm, n, c.rope, i) for n, x, i in (("q", c.q, c.q_start), ("k", c.k, 0)))
    duals = zip((c.q, c.k, c.v), qkv_duals(c, given))
    dq, dk, dv = (None if dx is None else unit_stride(dx.to(x.dtype)) for x, (_, dx) in duals)
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    frames: dict[str, Any] = {"mask": c.mask, "q_start": c.q_start, "lengths": c.lengths}
    tangents.temporal_tangents(q, k, c.v, out, lse, (dq, dk, dv), dout, dlse, sm_scale=c.scale, **frames)
    return dout, dlse


TEMPORAL = Implementation(_temporal, _temporal_backward, _temporal_why_not, tangents=temporal_tangents)
