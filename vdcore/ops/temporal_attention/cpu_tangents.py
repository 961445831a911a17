"""Tangents of attention on the CPU engine: csrc/cpu/temporal_attention/tangents.cpp, and frame attention's.

Norm and rope and their tangents take passes of their own before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.call import empty_like, mask_numbers
from vdcore.ops.check import unit_stride
from vdcore.ops.native import capsule, native
from vdcore.ops.qk_norm_rope.cpu import WEIGHTS, NormRopeBefore, normed_tangents, rotated
from vdcore.ops.qk_norm_rope.tangents import Dual
from vdcore.ops.temporal_attention import tangents
from vdcore.ops.temporal_attention.cpu import added_bias
from vdcore.ops.temporal_attention.tangents import qkv_duals
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


SHARED = (*WEIGHTS, "cos", "sin")  # by all rows


@dataclass
class Part:
    """A part of a joint sequence: the video, or the text, which is a video of one frame.

    Args:
        q, k, v: as the scores see them, in forward's dtype, ``(B, T, S, H, D)`` and ``(B, K, R, G, D)`` twice.
        out, lse: of forward, ``(B, T, S, H, D)`` and ``(B, T, S, H)``.
        dout, dlse: to be filled.
    """

    q: Dual
    k: Dual
    v: Dual
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor


def prepared(
    q: Dual, k: Dual, norm: QKNorm | None, rope: Rope | None, q_start: int, given: dict[str, Tensor], prefix: str = ""
) -> tuple[Dual, Dual]:
    """As :func:`tangents.prepared`; on the engine where no weight or table has a tangent, and heads share the table."""
    before = NormRopeBefore(q[0], k[0], norm, rope, q_start)
    of_heads = rope is not None and rope.cos.ndim == 4 and rope.cos.shape[2] > 1
    if not before.on_engine or of_heads or not given.keys().isdisjoint(prefix + name for name in SHARED):
        return tangents.prepared(q, k, norm, rope, q_start, given, prefix)
    moved = [dual[1] for dual in (q, k)]
    if norm is not None:
        moved = normed_tangents(q[0], k[0], norm, moved)
    if rope is not None:
        there = [dx for dx in moved if dx is not None]
        each = iter(rotated(there, rope) if there else ())
        moved = [None if dx is None else next(each) for dx in moved]
    q_, k_ = before.forward()
    return (q_, moved[0]), (k_, moved[1])


def run_tangents(engine: Callable[..., None], parts: list[Part], scale: float) -> None:
    """Fills the parts' dout and dlse; ``engine``: of the native module, with the groups or the plan that it takes."""
    for name in "qkv":  # a tangent that one part has, both have
        if any(getattr(part, name)[1] is not None for part in parts):
            for part in parts:
                x, dx = getattr(part, name)
                setattr(part, name, (x, torch.zeros_like(x) if dx is None else unit_stride(dx)))
    video, *text = (
        [capsule(x) for x in (p.q[0], p.k[0], p.v[0], p.out, p.lse, p.dout, p.dlse, p.q[1], p.k[1], p.v[1])]
        for p in parts
    )
    engine(video=video, text=text[0] if text else [], scale=scale, threads=torch.get_num_threads())


def temporal_attention(c: TemporalCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    (q, dq), (k, dk), (v, dv) = qkv_duals(c, given, prepared)
    native().temporal_attention_tangents(
        q=capsule(q),
        k=capsule(k),
        v=capsule(v),
        out=capsule(out),
        lse=capsule(lse),
        lengths=None if c.lengths is None else c.lengths.tolist(),
        mask=mask_numbers(c.mask),
        q_start=c.q_start,
        scale=c.scale,
        bias=None if c.bias is None else capsule(added_bias(c.bias)),
        dbias=capsule(added_bias(given["bias"])) if "bias" in given else None,
        threads=torch.get_num_threads(),
        **{name: None if dx is None else capsule(unit_stride(dx)) for name, dx in (("dq", dq), ("dk", dk), ("dv", dv))},
        dout=capsule(dout),
        dlse=capsule(dlse),
    )
    return dout, dlse
