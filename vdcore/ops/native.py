"""The compiled CPU engine ``vdcore._native``, and arguments as it takes them: tensors are DLPack capsules."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vdcore.norm import KINDS, QKNorm
from vdcore.rope import STYLES, Rope

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Sums over positions (gradients of weights and of shared rope tables) are taken in this many parts, whatever the number
# of threads: the same bits on every machine.
SUM_PARTS = 64


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("vdcore._native")
    except ImportError as error:
        return None, f"vdcore was installed without its compiled module ({error})"
    # torch's own threads, which wait at a processor for more work after every torch operator.
    module.share_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return module, None


def native() -> ModuleType:
    """The module ``vdcore._native``; only after :func:`missing` has returned None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def missing() -> str | None:
    """The reason why there is no compiled module, or None."""
    return _load()[1]


def why_not(x: Tensor, head_dim: int = 0) -> str | None:
    """Objections to a device, a dtype and a head dim."""
    if not x.is_cpu:
        return f"it runs on the CPU, and the tensors are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def float_weights(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def capsule(x: Tensor | None) -> object:
    return None if x is None else to_dlpack(x)


def norm_of(norm: QKNorm | None) -> tuple[Any, ...] | None:
    """A norm as the native module takes it; capsules keep alive what they point to."""
    if norm is None:
        return None
    weights = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
    return KINDS[norm.kind], norm.over == "all", norm.eps, *(capsule(float_weights(x)) for x in weights)


def rope_of(rope: Rope | None) -> tuple[Any, ...] | None:
    """RoPE as the native module takes it."""
    if rope is None:
        return None
    tables = [x if x.ndim == 4 else x.unsqueeze(2) for x in (rope.cos, rope.sin)]
    if tables[0].dtype != tables[1].dtype:  # the engine reads both in one dtype
        tables = [x.float() for x in tables]
    return STYLES[rope.style], *map(capsule, tables)
