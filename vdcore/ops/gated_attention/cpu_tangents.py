"""Tangents of gated attention on the CPU engine: of the spatial and the temporal part, mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.ops.frame_attention import cpu_tangents as frame_attention
from vdcore.ops.gated_attention.tangents import by_parts
from vdcore.ops.temporal_attention import cpu
from vdcore.ops.temporal_attention import cpu_tangents as temporal_attention

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def gated_attention(c: GatedCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the result, the spatial part, and both lse."""
    _, temporal = c.parts()
    t, _ = temporal.empty_outputs()
    cpu.run_forward(temporal, t, None)
    return by_parts(c, outputs, t, given, frame_attention.video_attention, temporal_attention.temporal_attention)
