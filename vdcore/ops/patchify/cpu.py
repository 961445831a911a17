"""Patch embedding and its inverse on the CPU engine: csrc/cpu/patchify.

Both are products of patches ``(tokens, K)``, tokens ``(tokens, E)`` and a weight; so are all their gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import capsule, float_weights, native, why_not

if TYPE_CHECKING:
    from vdcore.ops.patchify import PatchifyCall, UnpatchifyCall

_SUM_PARTS = 8  # parts of the tokens for the weight's gradient: each takes as much memory as that in float32


class _Patches:
    """Patch size and order of a patch's numbers, and the weight as the native module takes it."""

    def __init__(self, patch: tuple[int, int, int], channels_last: bool, weight: Tensor, k_first: bool) -> None:
        self.patch, self.channels_last = tuple(patch), channels_last
        rows = float_weights(weight.reshape(weight.shape[0], -1))
        assert rows is not None
        self.weight = rows if k_first else rows.T  # (K, E)
        self.K, self.E = self.weight.shape

    def _arguments(self, video: Tensor, tokens: Tensor) -> dict[str, Any]:
        """What all products of the engine take."""
        return {
            "video": capsule(video),
            "patch": self.patch,
            "channels_last": self.channels_last,
            "tokens": capsule(tokens),
            "threads": torch.get_num_threads(),
        }

    def product(self, to_tokens: bool, video: Tensor, tokens: Tensor, bias: Tensor | None) -> None:
        """tokens = patches @ weight + bias, or patches = tokens @ weight.T + bias."""
        packed, bias = torch.empty((self.E + 64) * (self.K + 64)), float_weights(bias)
        native().patch_product(
            **self._arguments(video, tokens),
            to_tokens=to_tokens,
            weight=capsule(self.weight),
            bias=capsule(bias),
            packed=capsule(packed),
        )

    def weight_gradient(
        self, video: Tensor, tokens: Tensor, sum_tokens: bool, sum_patches: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(K, E)`` in float64, and sums over tokens ``(E,)`` and patches ``(K,)``."""
        parts = min(_SUM_PARTS, tokens.shape[:3].numel())
        dweight = torch.empty(parts, self.K, self.E)
        of_tokens = torch.empty(parts, self.E) if sum_tokens else None
        of_patches = torch.empty(parts, self.K) if sum_patches else None
        native().patch_weight_gradient(
            **self._arguments(video, tokens),
            parts=parts,
            dweight=capsule(dweight),
            sum_tokens=capsule(of_tokens),
            sum_patches=capsule(of_patches),
        )
        sums = [None if x is None else x.sum(0, dtype=torch.float64) for x in (of_tokens, of_patches)]
        return dweight.sum(0, dtype=torch.float64), sums[0], sums[1]


# ---- patchify ----


def _patchify_layout(c: PatchifyCall) -> _Patches:
    _, _, pt, ph, pw = c.weight.shape
    return _Patches((pt, ph, pw), False, c.weight, k_first=False)


def _patchify_forward(c: PatchifyCall) -> tuple[Tensor, ...]:
    (tokens,) = c.empty_outputs()
    _patchify_layout(c).product(True, c.video, tokens, c.bias)
    return (tokens,)


def _patchify_backward(
    c: PatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    assert grads[0] is not None
    dtokens, patches = unit_stride(grads[0]), _patchify_layout(c)
    found: Gradients = {}
    if "video" in wanted:
        found["video"] = torch.empty(c.video.shape, dtype=c.video.dtype)
        patches.product(False, found["video"], dtokens, None)
    if wanted & {"weight", "bias"}:
        dweight, dbias, _ = patches.weight_gradient(c.video, dtokens, "bias" in wanted, False)
        found["weight"] = dweight.T.to(c.weight.dtype, memory_format=torch.contiguous_format).reshape(c.weight.shape)
        if dbias is not None:
            found["bias"] = dbias
    return found


def _patchify_why_not(c: PatchifyCall) -> str | None:
    return why_not(c.video)


# ---- unpatchify ----


def _unpatchify_layout(c: UnpatchifyCall) -> _Patches:
    return _Patches(c.patch, c.order == "pt ph pw c", c.weight, k_first=True)


def _unpatchify_forward(c: UnpatchifyCall) -> tuple[Tensor, ...]:
    (video,) = c.empty_outputs()
    _unpatchify_layout(c).product(False, video, c.tokens, c.bias)
    return (video,)


def _unpatchify_backward(
    c: UnpatchifyCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    (dvideo,) = grads
    assert dvideo is not None
    patches = _unpatchify_layout(c)
    found: Gradients = {}
    if "tokens" in wanted:
        found["tokens"] = torch.empty(c.tokens.shape, dtype=c.tokens.dtype)
        patches.product(True, dvideo, found["tokens"], None)
    if wanted & {"weight", "bias"}:
        found["weight"], _, dbias = patches.weight_gradient(dvideo, c.tokens, False, "bias" in wanted)
        if dbias is not None:
            found["bias"] = dbias
    return found


def _unpatchify_why_not(c: UnpatchifyCall) -> str | None:
    return why_not(c.tokens)


PATCHIFY = Implementation(_patchify_forward, _patchify_backward, _patchify_why_not)
UNPATCHIFY = Implementation(_unpatchify_forward, _unpatchify_backward, _unpatchify_why_not)
