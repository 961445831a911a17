"""What the operators of the Triton backend share: what it can run, gradients of packed tensors, norm and rope."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vdcore.backends.base import Gradients
from vdcore.backends.call import AttentionCall
from vdcore.norm import QKNorm
from vdcore.rope import Rope

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def interpreted() -> bool:
    """Triton decides this once, when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it has no {x.dtype}"
    if x.device.type == "cuda":
        return None
    if x.device.type == "cpu" and interpreted():
        return "Triton's interpreter multiplies bfloat16 matrices wrongly" if x.dtype == torch.bfloat16 else None
    return f"it runs on a GPU, and the tensors are on {x.device}"


def why_not_head(q: Tensor) -> str | None:
    return None if q.shape[-1] <= MAX_HEAD_DIM else f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"


def why_not_norm(q: Tensor, k: Tensor, norm: QKNorm | None) -> str | None:
    from vdcore.kernels.qk_norm_rope import MAX_TOKEN, fits

    if all(fits(x.shape[-2], x.shape[-1], norm) for x in (q, k)):
        return None
    return f"a norm over all heads holds at most {MAX_TOKEN} channels of a token"


def why_not_tokens(*tensors: Tensor) -> str | None:
    """Limits of tiles of tokens: their numbers, and their offsets in a tile, have 32 bits."""
    if any(x.shape[1] * x.shape[2] >= 2**31 - 2**16 for x in tensors):
        return "it counts the tokens of a sample in 32 bits"
    if any(x.shape[3] * x.shape[4] >= 2**22 for x in tensors):
        return "it has less than 2**22 channels a token, all heads together"
    return None


def unit(x: Tensor) -> Tensor:
    """An incoming gradient with innermost stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def qkv_gradients(c: AttentionCall) -> tuple[Gradients, tuple[Tensor, Tensor, Tensor]]:
    """Room for the gradients by name, and for those of q, k and v: slices of one tensor where the call is packed."""
    if c.packed is not None:
        packed = empty_like(c.packed)
        return {"q": packed}, packed.unbind(3)
    found = {"q": empty_like(c.q), "k": empty_like(c.k), "v": empty_like(c.v)}
    return found, tuple(found.values())


def frames(c: AttentionCall) -> dict[str, Any]:
    return {"mask": c.mask, "q_start": c.q_start, "lengths": c.lengths}


def seen_by_scores(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None = None, start: int = 0) -> Tensor:
    """Queries (role ``"q"``) or keys as the scores see them: normed and rotated."""
    from vdcore.kernels.qk_norm_rope import norm_rope_forward

    return x if norm is None and rope is None else norm_rope_forward(x, norm, role, rope, start)


def norm_rope_gradients(
    found: Gradients,
    x: Tensor,
    dy: Tensor | None,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    start: int,
    wanted: frozenset[str],
    *,
    prefix: str = "",
    keep: bool = True,
    **where: Any,
) -> None:
    """Adds what the norm and rope of q or k give their tensors, under the names of the call; x's too with ``keep``."""
    from vdcore.kernels.qk_norm_rope import norm_rope_backward

    names = {"weight": f"{prefix}{role}_weight", "bias": f"{prefix}{role}_bias"}
    names |= {"cos": f"{prefix}cos", "sin": f"{prefix}sin"}
    inner = frozenset(short for short, name in names.items() if name in wanted)
    dy = unit(dy) if dy is not None else torch.zeros_like(x, memory_format=torch.contiguous_format)
    for short, dx in norm_rope_backward(x, dy, norm, role, rope, start, inner, **where).items():
        name = names.get(short, prefix + role)
        if short == "x" and not keep:
            continue
        found[name] = found[name] + dx if short in ("cos", "sin") and name in found else dx
