"""Gated attention: spatial attention, and temporal attention whose kernel mixes the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.ops.call import Triple, empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.frame_attention.triton import frame_tangents
from vdcore.ops.gated_attention.tangents import by_parts
from vdcore.ops.qk_norm_rope.triton import norm_rope_gradients, normalized_rotated
from vdcore.ops.temporal_attention.triton import temporal_tangents
from vdcore.ops.triton import why_not, why_not_head, why_not_norm, why_not_tangents, why_not_tokens

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def _why_not(c: GatedCall) -> str | None:
    (q, k, _), (temporal_q, temporal_k, _) = c.spatial, c.temporal
    norms = why_not_norm(q, k, c.spatial_norm) or why_not_norm(temporal_q, temporal_k, c.temporal_norm)
    return why_not(q) or why_not_head(q) or why_not_tokens(q) or norms


def _spatial(c: GatedCall) -> Any:
    """Spatial attention, of q and k after norm and RoPE, as its kernels take it."""
    from vdcore_kernels.core.tokens import Lengths
    from vdcore_kernels.frame_attention.problem import FrameProblem

    q, k = (normalized_rotated(x, c.spatial_norm, role, c.spatial_rope) for role, x in zip("qk", c.spatial))
    mask, lengths = FrameMask.same_frame(), Lengths(c.lengths, None, None)
    return FrameProblem(q, k, c.spatial[2], c.scale, lengths=lengths, mask=mask)


def _temporal_arguments(c: GatedCall) -> dict[str, Any]:
    return {
        "mask": c.mask,
        "q_start": 0,
        "lengths": c.lengths,
        "sm_scale": c.scale,
        "norm": c.temporal_norm,
        "rope": c.temporal_rope,
    }


def _empty_gradients(qkv: Triple) -> Triple:
    q, k, v = (empty_like(x) for x in qkv)
    return q, k, v


def _forward(c: GatedCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.core.gate import gate_arguments
    from vdcore_kernels.frame_attention.forward import frame_forward
    from vdcore_kernels.temporal_attention.forward import temporal_forward

    out, kept, lse_a, lse_b = c.empty_outputs()
    a = out if kept is None else kept
    frame_forward(_spatial(c), a, lse_a)
    temporal_forward(*c.temporal, out, lse_b, gate=gate_arguments(c.gate, a), **_temporal_arguments(c))
    return out, kept, lse_a, lse_b


def _backward(
    c: GatedCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.frame_attention.backward import frame_backward
    from vdcore_kernels.gated_attention.backward import gated_temporal_backward
    from vdcore_kernels.qk_norm_rope.backward import live_frames

    _, a, lse_a, lse_b = outputs
    assert grads[0] is not None
    gradients = _empty_gradients(c.temporal)
    names = frozenset(name.removeprefix("temporal_") for name in wanted if name.startswith("temporal_"))
    given: dict[str, Any] = {"a": a, "lse": lse_b, "dout": unit_stride(grads[0]), "gate": c.gate, "wanted": names}
    q, k, v = c.temporal
    da, dgate, more = gated_temporal_backward(
        q, k, v, gradients=gradients, wants_gate="gate" in wanted, **given, **_temporal_arguments(c)
    )
    found: Gradients = {f"temporal_{name}": dx for name, dx in zip("qkv", gradients)}
    found |= {f"temporal_{name}": dx for name, dx in more.items()}
    if dgate is not None:
        found["gate"] = dgate

    gradients = _empty_gradients(c.spatial)
    found |= {f"spatial_{name}": dx for name, dx in zip("qkv", gradients)}
    frame_backward(_spatial(c), a, lse_a, da.flatten(1, 2), None, gradients)
    if c.spatial_norm or c.spatial_rope:
        live = live_frames(c.main, c.spatial[1], mask=FrameMask.same_frame(), q_start=0, lengths=c.lengths)
        for role, x, dx, alive in zip("qk", c.spatial, gradients, live):
            norm_rope_gradients(
                found, x, dx, c.spatial_norm, role, c.spatial_rope, 0, wanted, prefix="spatial_", live=alive
            )
    return found


def _why_not_tangents(c: GatedCall) -> str | None:
    return why_not_tangents(c.main)


def _tangents(c: GatedCall, outputs: tuple[Tensor, ...], given: Gradients) -> tuple[Tensor, ...]:
    """Of the result, the spatial part, and both lse."""
    from vdcore_kernels.temporal_attention.forward import temporal_forward

    t = empty_like(c.main)
    temporal_forward(*c.temporal, t, None, **_temporal_arguments(c))
    return by_parts(c, outputs, t, given, frame_tangents, temporal_tangents)


GATED = Implementation(_forward, _backward, _why_not, tangents=_tangents, why_not_tangents=_why_not_tangents)
