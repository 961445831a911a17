"""Tangents of attention to listed tiles on the CPU engine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.native import native
from vdcore.ops.temporal_attention.cpu_tangents import Part, run_tangents
from vdcore.ops.tile_attention.cpu import plan_of

if TYPE_CHECKING:
    from vdcore.ops.tile_attention import TileCall


def tile_attention(c: TileCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
    q, k, v = ((getattr(c, name), given.get(name)) for name in "qkv")
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    engine = partial(native().tile_attention_tangents, plan=plan_of(c))
    run_tangents(engine, [Part(q, k, v, out, lse, dout, dlse)], c.scale)
    return dout, dlse
