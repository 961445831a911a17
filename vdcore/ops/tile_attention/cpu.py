"""Attention to listed tiles on the CPU engine: csrc/cpu/tile_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.frame_attention.cpu import Segment
from vdcore.ops.frame_attention.windows_cpu import attend, attend_backward
from vdcore.ops.native import capsule, native, why_not
from vdcore.ops.qk_norm_rope.cpu import NormRopeBefore

if TYPE_CHECKING:
    from vdcore.ops.tile_attention import TileCall


def plan_of(c: TileCall) -> Any:
    B, T = c.q.shape[:2]
    return native().lists_plan(
        batch=B,
        frames=T,
        rows=c.grid[0],
        columns=c.grid[1],
        tile=[min(step, max(size, 1)) for step, size in zip(c.tile, (T, *c.grid))],  # of ints of 32 bits
        list_batch=c.indices.shape[0],
        list_heads=c.indices.shape[1],
        most=c.indices.shape[3],
        indices=capsule(c.indices.contiguous()),
        counts=capsule(c.counts.contiguous()),
    )


def _segments(c: TileCall) -> list[Segment]:
    return [Segment(NormRopeBefore(c.q, c.k, None, None), c.v)]


def _forward(c: TileCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    attend(plan_of(c), _segments(c), (out,), (lse,), c.scale)
    return out, lse


def _backward(
    c: TileCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    (out, lse), (dout, dlse) = outputs, grads
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = [empty_like(x) for x in (c.q, c.k, c.v)]
    rows: Any = [(None if x is None else unit_stride(x),) for x in (out, lse, dout, dlse)]
    attend_backward(plan_of(c), _segments(c), rows, [gradients], c.scale)
    return dict(zip("qkv", gradients))


def _why_not(c: TileCall) -> str | None:
    return why_not(c.q, c.q.shape[-1])


TILES = Implementation(_forward, _backward, _why_not)
