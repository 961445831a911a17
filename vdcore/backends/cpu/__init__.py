"""The native CPU engine as a backend: C++ kernels in csrc/cpu, one module here for each operator family there."""

from __future__ import annotations

from functools import cache

from vdcore.backends._native import why_no_native
from vdcore.backends.base import Backend
from vdcore.backends.cpu import adaln, frame_attention, gated_attention, patchify, qk_norm_rope, temporal_attention


@cache
def missing() -> str | None:
    return why_no_native()


_FAMILIES = (temporal_attention, frame_attention, gated_attention, qk_norm_rope, patchify, adaln)

BACKEND = Backend(
    name="cpu",
    missing=missing,
    operators={op: implementation for family in _FAMILIES for op, implementation in family.OPERATORS.items()},
)
