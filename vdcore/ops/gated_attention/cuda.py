"""Gated attention, forward: temporal attention, then csrc/cuda/gated_attention.cuh, whose epilogue mixes the two."""

from __future__ import annotations

from torch import Tensor

from vdcore.backends.base import Implementation
from vdcore.backends.call import GatedCall, TemporalCall
from vdcore.backends.cuda._common import capsule, kernels, stream, why_not, why_not_norm, why_not_rows
from vdcore.backends.cuda.qk_norm_rope import seen_by_scores
from vdcore.backends.cuda.temporal_attention import run_forward, why_not_temporal


def _temporal(c: GatedCall) -> TemporalCall:
    return TemporalCall(
        *("temporal_attention", c.grad, *c.temporal, None, c.mask, 0, c.lengths),
        *(c.scale, c.norm[1], c.rope[1], False),
    )


def _why_not(c: GatedCall) -> str | None:
    q, k, v = c.spatial
    reason = why_not(q) or why_not_rows(q=q, k=k, v=v) or why_not_norm(c.norm[0]) or why_not_temporal(_temporal(c))
    if reason is None and q.shape[2] >= 2**31 - 128:
        return "it counts the tokens of a frame in 32 bits"
    return reason


def _forward(c: GatedCall) -> tuple[Tensor, ...]:
    out, kept, lse, temporal_lse = c.empty_outputs()
    run_forward(_temporal(c), out, temporal_lse if c.grad else None)
    q, k, v = c.spatial
    q, k = (seen_by_scores(x, c.norm[0], role, c.rope[0]) for x, role in ((q, "q"), (k, "k")))
    gate = c.gate.detach().expand(out.shape)
    lengths = None if c.lengths is None else c.lengths.contiguous()
    kept_or_none, lse_or_none = (kept, lse) if c.grad else (None, None)
    kernels().cuda_spatial_gated_forward(
        *map(capsule, (q, k, v, out, kept_or_none, lse_or_none, gate, lengths)), c.scale, stream(q)
    )
    return out, kept, lse, temporal_lse


OPERATORS = {"gated_attention": Implementation(_forward, None, _why_not)}
