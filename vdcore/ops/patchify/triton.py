"""Patches: products that gather from the video and scatter into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.ops.call import empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.triton import why_not

if TYPE_CHECKING:
    from vdcore.ops.patchify import PatchifyCall, UnpatchifyCall


def _why_not_size(tokens: int, *tensors: Tensor) -> str | None:
    if any(x.dtype != tensors[0].dtype for x in tensors):
        return "the weight must have the dtype of what it multiplies"
    return why_not(tensors[0]) or (None if tokens < 2**31 - 2**16 else "it counts tokens in 32 bits")


def _patchify_why_not(c: PatchifyCall) -> str | None:
    B, _, T, H, W = c.video.shape
    pt, ph, pw = c.weight.shape[2:]
    return _why_not_size(B * (T // pt) * (H // ph) * (W // pw), c.video, c.weight)


def _patchify(c: PatchifyCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.patchify.products import Patch, gather_product

    (tokens,) = c.empty_outputs()
    gather_product(c.video, c.weight, _bias(c.bias), tokens, Patch(*c.weight.shape[1:]))
    return (tokens,)


def _bias(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _patchify_backward(
    c: PatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.patchify.products import Patch, scatter_product, weight_product

    assert grads[0] is not None
    dy, patch = unit_stride(grads[0]), Patch(*c.weight.shape[1:])
    found: Gradients = {}
    if "video" in wanted:
        found["video"] = empty_like(c.video)
        scatter_product(dy, c.weight, None, found["video"], patch)
    if "weight" in wanted:
        found["weight"] = weight_product(c.video, dy, c.weight, patch)
    if "bias" in wanted:
        found["bias"] = dy.sum((0, 1, 2), dtype=torch.float32)
    return found


def _unpatchify_why_not(c: UnpatchifyCall) -> str | None:
    return _why_not_size(c.tokens.shape[0] * c.tokens.shape[1] * c.tokens.shape[2], c.tokens, c.weight)


def _unpatchify(c: UnpatchifyCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.patchify.products import Patch, scatter_product

    (video,) = c.empty_outputs()
    scatter_product(c.tokens, c.weight, _bias(c.bias), video, Patch(c.channels, *c.patch), c.order)
    return (video,)


def _unpatchify_backward(
    c: UnpatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.patchify.products import Patch, gather_product, weight_product

    assert grads[0] is not None
    dy, patch = unit_stride(grads[0]), Patch(c.channels, *c.patch)
    found: Gradients = {}
    if "tokens" in wanted:
        found["tokens"] = empty_like(c.tokens)
        gather_product(dy, c.weight, None, found["tokens"], patch, c.order)
    if "weight" in wanted:
        found["weight"] = weight_product(dy, c.tokens, c.weight, patch, c.order)
    if "bias" in wanted:
        (pt, ph, pw), (T, H, W) = c.patch, c.grid
        places = dy.unflatten(4, (W, pw)).unflatten(3, (H, ph)).unflatten(2, (T, pt))
        total = places.sum((0, 2, 4, 6), dtype=torch.float32)  # (C, pt, ph, pw)
        found["bias"] = (total if c.order == "c pt ph pw" else total.permute(1, 2, 3, 0)).reshape(-1)
    return found


PATCHIFY = Implementation(_patchify, _patchify_backward, _patchify_why_not)
UNPATCHIFY = Implementation(_unpatchify, _unpatchify_backward, _unpatchify_why_not)
