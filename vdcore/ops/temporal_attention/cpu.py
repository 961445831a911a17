"""Temporal attention on the CPU engine: csrc/cpu/temporal_attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vdcore.ops.call import empty_like, mask_numbers
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, native, norm_of, rope_of, why_not
from vdcore.ops.qk_norm_rope.cpu import SharedGradients

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


def _arguments(c: TemporalCall, out: Tensor, lse: Tensor | None) -> dict[str, Any]:
    """What both directions of the engine take."""
    q, k, v = c.qkv.tensors()
    return {
        "q": to_dlpack(q),
        "k": None if k is None else to_dlpack(k),
        "v": None if v is None else to_dlpack(v),
        "out": to_dlpack(out),
        "lse": None if lse is None else to_dlpack(lse),
        "lengths": None if c.lengths is None else c.lengths.tolist(),
        "mask": mask_numbers(c.mask),
        "q_start": c.q_start,
        "scale": c.scale,
        "norm": norm_of(c.norm),
        "rope": rope_of(c.rope),
        "bias": None if c.bias is None else to_dlpack(added_bias(c.bias)),
        "threads": torch.get_num_threads(),
    }


def added_bias(bias: Tensor) -> Tensor:
    """As the engine adds it to scores: ``(H or 1, T_k, T)`` in base 2, T padded to whole vectors."""
    scores = bias.detach().to(torch.float32).mT * math.log2(math.e)
    return F.pad(scores, (0, -scores.shape[-1] % 16)).contiguous()


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    native().temporal_attention_forward(**_arguments(c, out, lse))


def _forward(c: TemporalCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


# Gradients that need that of q, k or v.
_NEEDED_BY = {
    "q": {"q", "q_weight", "q_bias", "cos", "sin"},
    "k": {"k", "k_weight", "k_bias", "cos", "sin"},
    "v": {"v"},
}


def run_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    """Gradients by the names of ``c.NAMES``."""
    out, lse = outputs
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dout, dlse = unit_stride(dout), None if dlse is None else unit_stride(dlse)
    found: Gradients = {}

    # Gradients of q, k and v; also where only a weight behind them wants one.
    if c.packed is not None:
        found["q"] = empty_like(c.packed)
    else:
        for name, x in zip("qkv", (c.q, c.k, c.v)):
            if not wanted.isdisjoint(_NEEDED_BY[name]):
                found[name] = empty_like(x)

    arguments = _arguments(c, out, lse)
    arguments["dout"] = to_dlpack(dout)
    arguments["dlse"] = None if dlse is None else to_dlpack(dlse)
    for name, key in (("q", "dq"), ("k", "dk"), ("v", "dv")):
        arguments[key] = to_dlpack(found[name]) if name in found else None
    sums = SharedGradients(c.norm, c.rope, wanted)
    B, _, S, _, _ = out.shape
    units = S if sums.per_position else B * S
    shared = sums.wanted or "bias" in wanted
    parts = min(units, SUM_PARTS if shared else max(64 * arguments["threads"], units // 64))
    arguments |= sums.arguments(parts)
    dbias = None
    if "bias" in wanted and c.bias is not None:
        heads, T, T_k = c.bias.shape
        dbias = torch.zeros(parts, heads, T_k, -(-T // 16) * 16)
    native().temporal_attention_backward(**arguments, dbias=None if dbias is None else to_dlpack(dbias))
    if dbias is not None:
        found["bias"] = dbias.sum(0, dtype=torch.float64)[..., :T].mT.contiguous()
    return found | sums.total() if sums.wanted else found


def _why_not(c: TemporalCall) -> str | None:
    return why_not(c.qkv.main, c.qkv.main.shape[-1])


TEMPORAL = Implementation(_forward, run_backward, _why_not)
