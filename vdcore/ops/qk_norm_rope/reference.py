"""Oracle of the fused QK-norm and rope."""

from __future__ import annotations

from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.reference._attend import norm_rope
from vdcore.rope import Rope


def qk_norm_rope(
    q: Tensor, k: Tensor, *, norm: QKNorm | None, rope: Rope | None, frame_start: int
) -> tuple[Tensor, Tensor]:
    """q ``(B, T, S, H, D)`` and k ``(B, T, S, G, D)``, normed, then rotated: frame ``t`` by row ``frame_start + t``."""
    dtype = q.dtype
    if rope is not None and rope.cos.shape[0] != 1:
        rope = Rope(rope.cos[frame_start:], rope.sin[frame_start:], rope.style)
    q, k = norm_rope(q, k, norm, rope, 0)
    return q.to(dtype), k.to(dtype)
