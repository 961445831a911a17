"""The Triton kernels as a backend."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from vdcore.backends.base import Backend


@cache
def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return None


BACKEND = Backend(name="triton", missing=missing)
