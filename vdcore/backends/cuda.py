"""The CUDA kernels of the native module as a backend."""

from __future__ import annotations

from functools import cache

from vdcore.backends._native import native, why_no_native
from vdcore.backends.base import Backend


@cache
def missing() -> str | None:
    reason = why_no_native()
    if reason is not None:
        return reason
    return native().cuda_missing()


BACKEND = Backend(name="cuda", missing=missing)
