"""Attention to listed tiles by kernels over boxes of tokens, which read the lists where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.triton import output_gradients, why_not, why_not_boxes, why_not_tokens

if TYPE_CHECKING:
    from vdcore.ops.tile_attention import TileCall


def _why_not(c: TileCall) -> str | None:
    return why_not(c.q) or why_not_boxes(c.q) or why_not_tokens(c.q, c.k)


def _problem(c: TileCall) -> Any:
    from vdcore_kernels.tile_attention.problem import BoxProblem

    lists = c.indices.contiguous(), c.counts.contiguous()
    return BoxProblem(c.q, c.k, c.v, c.scale, grid=c.grid, tile=c.tile, tiles=lists)


def _forward(c: TileCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.tile_attention.forward import tile_forward

    out, lse = c.empty_outputs()
    tile_forward(_problem(c), out.flatten(1, 2), None if lse is None else lse.flatten(1, 2))
    return out, lse


def _backward(
    c: TileCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.tile_attention.backward import tile_backward

    out, lse = outputs
    dout, dlse = (None if x is None else x.flatten(1, 2) for x in output_gradients(out, grads))
    assert dout is not None
    q, k, v = (empty_like(x) for x in (c.q, c.k, c.v))
    tile_backward(_problem(c), out.flatten(1, 2), lse.flatten(1, 2), dout, dlse, (q, k, v))
    return {"q": q, "k": k, "v": v}


TILES = Implementation(_forward, _backward, _why_not)
