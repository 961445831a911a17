"""The Triton kernels as a backend: on a GPU, or on CPU tensors under Triton's interpreter.

One module here for each operator family in kernels/. The kernels are imported at the first call: ``import vdcore``
imports no triton.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from vdcore import extras
from vdcore.backends.base import Backend
from vdcore.backends.triton import (
    adaln,
    cross_attention,
    frame_attention,
    gated_attention,
    patchify,
    qk_norm_rope,
    temporal_attention,
)
from vdcore.backends.triton._common import interpreted

# Versions of Triton whose results are wrong, with the kernel and the configuration that shows it.
VERSION_DENYLIST: dict[str, str] = {}


@cache
def missing() -> str | None:
    if not extras.installed("triton"):
        return "triton is not installed"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = ""
    if installed in VERSION_DENYLIST:
        return f"triton {installed} gives wrong results: {VERSION_DENYLIST[installed]}"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU is visible to torch (with TRITON_INTERPRET=1 the kernels run on the CPU, interpreted)"
    return None


_FAMILIES = (adaln, cross_attention, frame_attention, gated_attention, patchify, qk_norm_rope, temporal_attention)
BACKEND = Backend(
    name="triton",
    missing=missing,
    operators={op: implementation for family in _FAMILIES for op, implementation in family.OPERATORS.items()},
)
