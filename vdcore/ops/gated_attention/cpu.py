"""Gated attention on the CPU: the temporal result goes to ``out``, and the spatial kernel mixes its own into it."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import FrameCall, GatedCall, TemporalCall
from vdcore.backends.cpu import frame_attention, temporal_attention
from vdcore.backends.cpu._arguments import why_not
from vdcore.mask import FrameMask

_NORM_ROPE = frozenset(("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin"))


def _spatial(c: GatedCall) -> FrameCall:
    return FrameCall(
        *("spatial_attention", c.grad, *c.spatial, None, FrameMask.same_frame(), 0, c.lengths),
        *(c.scale, c.norm[0], c.rope[0], False),
    )


def _temporal(c: GatedCall) -> TemporalCall:
    return TemporalCall(
        *("temporal_attention", c.grad, *c.temporal, None, c.mask, 0, c.lengths),
        *(c.scale, c.norm[1], c.rope[1], False),
    )


def _gate(c: GatedCall) -> Tensor:
    """The gate with five dimensions, 1 where it is broadcast."""
    gate = c.gate.detach().reshape((1,) * (5 - c.gate.ndim) + c.gate.shape)
    return gate if gate.stride(-1) == 1 else gate.contiguous()


def _rows(x: Tensor) -> Tensor | None:
    """``(B, T, S, H)`` of what is kept for backward, None where nothing is."""
    return None if x.numel() == 0 else x


def _forward(c: GatedCall) -> tuple[Tensor, ...]:
    out, spatial, lse, temporal_lse = c.empty_outputs()
    temporal_attention.run_forward(_temporal(c), out, _rows(temporal_lse))
    # The kernel of frame attention knows a joint sequence (B, T*S, H, D).
    joint, joint_lse = out.flatten(1, 2), None if _rows(lse) is None else lse.flatten(1, 2)
    kept = spatial if spatial.numel() else None
    frame_attention.run_forward(_spatial(c), joint, joint_lse, spatial=kept, gate=_gate(c))
    return out, spatial, lse, temporal_lse


def _backward(
    c: GatedCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    _, spatial, lse, _ = outputs
    dout, gate = grads[0], _gate(c)
    if dout is None:
        dout = torch.zeros_like(spatial)
    # Products with the gate stay in float32: rounding them would cost the gradients a digit.
    dout, found = dout.to(torch.float32), Gradients()

    temporal_call = _temporal(c)
    temporal, temporal_lse = temporal_call.empty_outputs()
    temporal_attention.run_forward(temporal_call, temporal, temporal_lse)
    if "gate" in wanted:
        products = dout * (spatial.to(torch.float32) - temporal.to(torch.float32))
        broadcast = [i for i, n in enumerate(gate.shape) if n == 1]
        total = products.sum(broadcast, keepdim=True, dtype=torch.float64) if broadcast else products
        found["gate"] = total.to(torch.float32).reshape(c.gate.shape).to(c.gate.dtype)
        del products, total

    spatial_wanted = frozenset(name for name in wanted if name in _NORM_ROPE or name in "qkv")
    if spatial_wanted:
        kept = spatial.flatten(1, 2), lse.flatten(1, 2)
        part = (gate * dout).flatten(1, 2)
        found |= frame_attention.run_backward(_spatial(c), kept, (part, None), spatial_wanted)
    temporal_wanted = frozenset(name.removeprefix("temporal_") for name in wanted if name.startswith("temporal_"))
    if temporal_wanted:
        part = (1 - gate) * dout
        back = temporal_attention.run_backward(temporal_call, (temporal, temporal_lse), (part, None), temporal_wanted)
        found |= {f"temporal_{name}": x for name, x in back.items()}
    return found


def _why_not(c: GatedCall) -> str | None:
    return why_not(c.main.device.type, c.main.dtype, c.main.shape[-1])


OPERATORS = {"gated_attention": Implementation(_forward, _backward, _why_not)}
