"""Gated attention, forward: temporal attention, then the kernel of csrc/cuda/gated_attention, which mixes the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.ops.choose import Implementation
from vdcore.ops.cuda import int64, kernels, stream, why_not, why_not_norm, why_not_rows
from vdcore.ops.native import capsule
from vdcore.ops.qk_norm_rope.cuda import normalized_rotated
from vdcore.ops.temporal_attention.cuda import run_forward, why_not_temporal

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def _why_not(c: GatedCall) -> str | None:
    q, k, v = c.spatial
    reason = why_not(q) or why_not_rows(q=q, k=k, v=v) or why_not_norm(c.spatial_norm)
    reason = reason or why_not_temporal(c.parts()[1])
    if reason is None and q.shape[2] >= 2**31 - 128:
        return "it counts the tokens of a frame in 32 bits"
    return reason


def _forward(c: GatedCall) -> tuple[Tensor | None, ...]:
    out, kept, lse, temporal_lse = c.empty_outputs()
    run_forward(c.parts()[1], out, temporal_lse)
    q, k, v = c.spatial
    q, k = normalized_rotated(q, k, c.spatial_norm, c.spatial_rope)
    kernels().spatial_gated_forward(
        q=capsule(q),
        k=capsule(k),
        v=capsule(v),
        out=capsule(out),
        kept=capsule(kept),
        lse=capsule(lse),
        gate=capsule(c.gate.detach().expand(out.shape)),
        lengths=int64(c.lengths),
        scale=c.scale,
        stream=stream(q),
    )
    return out, kept, lse, temporal_lse


GATED = Implementation(_forward, None, _why_not)
