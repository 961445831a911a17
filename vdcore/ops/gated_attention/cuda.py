"""Gated attention on Hopper, forward: temporal attention goes to ``out``, and frame attention mixes its own into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.ops.choose import Implementation
from vdcore.ops.frame_attention import cuda as frame_attention
from vdcore.ops.temporal_attention.cuda import run_forward, why_not_temporal

if TYPE_CHECKING:
    from vdcore.ops.gated_attention import GatedCall


def _why_not(c: GatedCall) -> str | None:
    spatial, temporal = c.parts()
    return frame_attention.why_not_frames(spatial) or why_not_temporal(temporal)


def _forward(c: GatedCall) -> tuple[Tensor | None, ...]:
    out, kept, lse, temporal_lse = c.empty_outputs()
    spatial, temporal = c.parts()
    run_forward(temporal, out, temporal_lse)
    # The kernel of frame attention knows a joint sequence (B, T*S, H, D).
    frame_attention.run_forward(
        spatial,
        out.flatten(1, 2),
        None if lse is None else lse.flatten(1, 2),
        spatial=None if kept is None else kept.flatten(1, 2),
        gate=c.gate.detach().expand(out.shape),
    )
    return out, kept, lse, temporal_lse


GATED = Implementation(_forward, None, _why_not)
