"""Operators that are no attention as formulas in PyTorch, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Function, Makers, compiled, narrow, norm_rope
from vdcore_bench.peers.registry import peer


def in_float32(function: Function) -> Function:
    """In float32 and back, for any function of tensors."""

    def widened(*args: Any, **kwargs: Any) -> Tensor:
        dtype = next(x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        return function(*(x.float() if isinstance(x, Tensor) else x for x in args), **wide).to(dtype)

    return widened


def eager_and_compiled(name: str, op: str, functions: dict[str, Function]) -> None:
    """Two baselines: every function as it is, and the first one compiled.

    Args:
        functions: by variant; ``"in float32"`` takes part, in both, in half precision on the CPU.
    """

    def fitting(job: Job) -> dict[str, Function]:
        return {variant: f for variant, f in functions.items() if narrow(job) or variant != "in float32"}

    @peer(name, (op,))
    def eager(job: Job) -> Makers:
        return {variant: lambda f=f: f for variant, f in fitting(job).items()}  # type: ignore[misc]

    @peer("compiled", (op,))
    def compile_first(job: Job) -> Makers:
        some = {v: f for v, f in fitting(job).items() if v in (next(iter(functions)), "in float32")}
        return {f"{variant}, compiled": lambda f=f: compiled(f) for variant, f in some.items()}  # type: ignore[misc]


def _qk_norm_rope(q: Tensor, k: Tensor, norm: Any, rope: Any) -> tuple[Tensor, Tensor]:
    q, k = norm_rope(q, k, norm, rope)
    return q.contiguous(), k.contiguous()


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None, None]) + shift[:, None, None]


def _gate_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + gate[:, None, None] * x


def _addcmul(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(residual, gate[:, None, None], x)


eager_and_compiled("eager", "qk_norm_rope", {"formula": _qk_norm_rope})
eager_and_compiled("eager", "modulate", {"layer_norm": _modulate})
eager_and_compiled("eager", "gate_residual", {"formula": _gate_residual, "addcmul": _addcmul})
