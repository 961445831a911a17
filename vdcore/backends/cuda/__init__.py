"""The CUDA kernels in csrc/cuda as a backend: on a GPU, or on CPU tensors under their emulator, which is for tests.

One module here for each operator family there.
"""

from __future__ import annotations

from functools import cache

from vdcore.backends.base import Backend
from vdcore.backends.cuda import frame_attention, gated_attention, qk_norm_rope, temporal_attention
from vdcore.backends.cuda._common import kernels, why_no_kernels


@cache
def missing() -> str | None:
    return why_no_kernels() or kernels().cuda_missing()


_FAMILIES = (temporal_attention, frame_attention, gated_attention, qk_norm_rope)

BACKEND = Backend(
    name="cuda",
    missing=missing,
    operators={op: implementation for family in _FAMILIES for op, implementation in family.OPERATORS.items()},
)
