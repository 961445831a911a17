"""Gated attention on the CPU: the temporal result goes to ``out``, and the spatial kernel mixes its own into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.frame_attention import cpu as frame_attention
from vdcore.ops.native import why_not
from vdcore.ops.temporal_attention import cpu as temporal_attention

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def _gate(c: GatedCall) -> Tensor:
    """The gate with five dimensions, 1 where it is broadcast."""
    return unit_stride(c.gate.detach().reshape((1,) * (5 - c.gate.ndim) + c.gate.shape))


def _forward(c: GatedCall) -> tuple[Tensor | None, ...]:
    out, kept, lse, temporal_lse = c.empty_outputs()
    spatial, temporal = c.parts()
    temporal_attention.run_forward(temporal, out, temporal_lse)
    # The kernel of frame attention knows a joint sequence (B, T*S, H, D).
    joint_lse = None if lse is None else lse.flatten(1, 2)
    frame_attention.run_forward(spatial, out.flatten(1, 2), joint_lse, spatial=kept, gate=_gate(c))
    return out, kept, lse, temporal_lse


def _backward(
    c: GatedCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    _, spatial, lse, _ = outputs
    spatial_call, temporal_call = c.parts()
    dout, gate = grads[0], _gate(c)
    if dout is None:
        dout = torch.zeros_like(spatial)
    # Products with the gate stay in float32: rounding them would cost the gradients a digit.
    dout, found = dout.to(torch.float32), Gradients()

    temporal, temporal_lse = temporal_call.empty_outputs()
    assert temporal_lse is not None
    temporal_attention.run_forward(temporal_call, temporal, temporal_lse)
    if "gate" in wanted:
        products = dout * (spatial.to(torch.float32) - temporal.to(torch.float32))
        broadcast = [i for i, n in enumerate(gate.shape) if n == 1]
        total = products.sum(broadcast, keepdim=True, dtype=torch.float64) if broadcast else products
        found["gate"] = total.to(torch.float32).reshape(c.gate.shape).to(c.gate.dtype)
        del products, total

    def below(prefix: str) -> frozenset[str]:
        return frozenset(name.removeprefix(prefix) for name in wanted if name.startswith(prefix))

    if names := below("spatial_"):
        kept, part = (spatial.flatten(1, 2), lse.flatten(1, 2)), (gate * dout).flatten(1, 2)
        back = frame_attention.run_backward(spatial_call, kept, (part, None), names)
        found |= {f"spatial_{name}": x for name, x in back.items()}
    if names := below("temporal_"):
        part = (1 - gate) * dout
        back = temporal_attention.run_backward(temporal_call, (temporal, temporal_lse), (part, None), names)
        found |= {f"temporal_{name}": x for name, x in back.items()}
    return found


def _why_not(c: GatedCall) -> str | None:
    return why_not(c.main, c.main.shape[-1])


GATED = Implementation(_forward, _backward, _why_not)
