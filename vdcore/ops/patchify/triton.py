"""Patches: one pass between video and matrix of patches; products with it are torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

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


def _bias(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.dtype)


def _patchify(c: PatchifyCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.patchify.patches import Patch, gather_patches

    (tokens,) = c.empty_outputs()
    patches = gather_patches(c.video, Patch(*c.weight.shape[1:]))
    return (F.linear(patches, c.weight.flatten(1), _bias(c.bias, patches)).view(tokens.shape),)


def _patchify_backward(
    c: PatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.patchify.patches import Patch, gather_patches, scatter_patches

    assert grads[0] is not None
    dy, patch = unit_stride(grads[0]).flatten(0, 2), Patch(*c.weight.shape[1:])
    found: Gradients = {}
    if "video" in wanted:
        found["video"] = empty_like(c.video)
        scatter_patches(dy @ c.weight.flatten(1), found["video"], patch)
    if "weight" in wanted:
        found["weight"] = (dy.t() @ gather_patches(c.video, patch)).view(c.weight.shape)
    if "bias" in wanted:
        found["bias"] = dy.sum(0, dtype=torch.float32)
    return found


def _unpatchify_why_not(c: UnpatchifyCall) -> str | None:
    return _why_not_size(c.tokens.shape[0] * c.tokens.shape[1] * c.tokens.shape[2], c.tokens, c.weight)


def _unpatchify(c: UnpatchifyCall) -> tuple[Tensor, ...]:
    from vdcore_kernels.patchify.patches import Patch, scatter_patches

    (video,) = c.empty_outputs()
    patches = F.linear(c.tokens.flatten(0, 2), c.weight, _bias(c.bias, c.tokens))
    scatter_patches(patches, video, Patch(c.channels, *c.patch, c.order == "pt ph pw c"))
    return (video,)


def _unpatchify_backward(
    c: UnpatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.patchify.patches import Patch, gather_patches

    assert grads[0] is not None
    patches = gather_patches(grads[0], Patch(c.channels, *c.patch, c.order == "pt ph pw c"))
    found: Gradients = {}
    if "tokens" in wanted:
        found["tokens"] = (patches @ c.weight).view(c.tokens.shape)
    if "weight" in wanted:
        found["weight"] = patches.t() @ c.tokens.flatten(0, 2)
    if "bias" in wanted:
        found["bias"] = patches.sum(0, dtype=torch.float32)
    return found


PATCHIFY = Implementation(_patchify, _patchify_backward, _patchify_why_not)
UNPATCHIFY = Implementation(_unpatchify, _unpatchify_backward, _unpatchify_why_not)
