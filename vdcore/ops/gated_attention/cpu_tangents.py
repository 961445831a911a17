"""Tangents of gated attention on the CPU engine: of the spatial and the temporal part, mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.norm import compute_dtype
from vdcore.ops.frame_attention import cpu_tangents as frame_attention
from vdcore.ops.gated_attention.tangents import mixed
from vdcore.ops.temporal_attention import cpu, cpu_tangents

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def gated_attention(c: GatedCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the result, the spatial part, and both lse."""
    _, s, lse, temporal_lse = outputs
    spatial, temporal = c.parts()
    t, _ = temporal.empty_outputs()
    cpu.run_forward(temporal, t, None)

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}

    joint = (s.flatten(1, 2), lse.flatten(1, 2))
    ds, dlse = frame_attention.video_attention(spatial, joint, below("spatial_"))
    dt, temporal_dlse = cpu_tangents.temporal_attention(temporal, (t, temporal_lse), below("temporal_"))
    ds, dtype = ds.view(s.shape), compute_dtype(s.dtype)
    out = mixed(c, ds.to(dtype), dt.to(dtype), given, lambda: (s.to(dtype), t.to(dtype)))
    return out.to(s.dtype), ds, dlse.view(lse.shape), temporal_dlse
