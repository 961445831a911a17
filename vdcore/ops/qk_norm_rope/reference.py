"""Oracle of the fused QK-norm and rope."""

from __future__ import annotations

from torch import Tensor

from vdcore.norm import QKNorm, compute_dtype
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


def norm_rope(q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, q_start: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(B, T, S, heads, D)`` as the scores see them, float32 at least."""
    q, k = q.to(compute_dtype(q.dtype)), k.to(compute_dtype(k.dtype))
    if norm is not None:
        q, k = norm.q(q), norm.k(k)
    if rope is not None:
        q, k = rope.rotate(q, q_start), rope.rotate(k)
    return q, k
