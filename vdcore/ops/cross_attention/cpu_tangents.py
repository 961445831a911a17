"""Tangents of cross attention on the CPU engine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.cross_attention.cpu import problem
from vdcore.ops.native import native
from vdcore.ops.qk_norm_rope.tangents import Dual
from vdcore.ops.temporal_attention.cpu_tangents import Part, run_tangents
from vdcore.ops.temporal_attention.tangents import prepared

if TYPE_CHECKING:
    from vdcore.ops.cross_attention import CrossCall


def cross_attention(c: CrossCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
    groups, segment = problem(c)

    def prompts(dual: Dual) -> Dual:
        """``(B, frames, L, G, D)``, a prompt of all frames as often as the groups count it."""
        x, dx = (y if y is None or y.ndim == 5 else y.unsqueeze(1) for y in dual)
        assert x is not None
        if segment.repeat > 1:
            x, dx = (y if y is None else y.expand(-1, segment.repeat, -1, -1, -1) for y in (x, dx))
        return x, dx  # type: ignore[return-value]

    q, k = prepared((c.q, given.get("q")), (c.k, given.get("k")), c.norm, None, 0, given)
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    part = Part(q, prompts(k), prompts((c.v, given.get("v"))), out, lse, dout, dlse)
    run_tangents(partial(native().frame_attention_tangents, groups=groups), [part], c.scale)
    return dout, dlse
