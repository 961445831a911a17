"""Norm and rope alone: csrc/cuda/qk_norm_rope.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends.base import Implementation
from vdcore.backends.call import QKNormRopeCall
from vdcore.backends.cuda._common import NormRope, capsule, kernels, stream, why_not, why_not_norm, why_not_rows
from vdcore.norm import QKNorm
from vdcore.rope import Rope


def seen_by_scores(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None = None, start: int = 0) -> Tensor:
    """Queries (role ``"q"``) or keys as the scores see them: normed and rotated, contiguous."""
    if norm is None and rope is None:
        return x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        shared = NormRope(norm, rope)
        kernels().cuda_rows_norm_rope(
            *(capsule(x), capsule(y), start, 0 if role == "q" else 1, shared.norm, shared.rope, stream(x))
        )
    return y


def _why_not(c: QKNormRopeCall) -> str | None:
    return why_not(c.q) or why_not_rows(q=c.q, k=c.k) or why_not_norm(c.norm)


def _forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    return tuple(seen_by_scores(x, c.norm, role, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


OPERATORS = {"qk_norm_rope": Implementation(_forward, None, _why_not)}
