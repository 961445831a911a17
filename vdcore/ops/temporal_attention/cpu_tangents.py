"""Tangents of attention on the CPU engine: csrc/cpu/frame_attention/tangents.cpp, for all operators.

Norm and rope and their tangents take passes of their own before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops.call import empty_like
from vdcore.ops.check import unit_stride
from vdcore.ops.native import capsule, native
from vdcore.ops.qk_norm_rope.tangents import Dual, norm_rope
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall


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
    """q and k as the scores see them: rounded to their dtype, as forward does, whose log-sum-exp is of these."""
    if norm is None and rope is None:
        return q, k
    sides = ((q, "q", q_start), (k, "k", 0))
    (q_, dq), (k_, dk) = (norm_rope(x, side, norm, rope, start, given, prefix) for x, side, start in sides)
    return (q_.to(q[0].dtype), dq), (k_.to(k[0].dtype), dk)


def run_tangents(groups: Any, parts: list[Part], scale: float) -> None:
    """Fills the parts' dout and dlse."""
    for name in "qkv":  # a tangent that one part has, both have
        if any(getattr(part, name)[1] is not None for part in parts):
            for part in parts:
                x, dx = getattr(part, name)
                setattr(part, name, (x, torch.zeros_like(x) if dx is None else unit_stride(dx)))
    video, *text = (
        [capsule(x) for x in (p.q[0], p.k[0], p.v[0], p.out, p.lse, p.q[1], p.k[1], p.v[1], p.dout, p.dlse)]
        for p in parts
    )
    native().frame_attention_tangents(
        groups=groups, video=video, text=text[0] if text else [], scale=scale, threads=torch.get_num_threads()
    )


def why_not(c: TemporalCall) -> str | None:
    if c.mask != FrameMask():
        return "its tangents of temporal attention know of no mask"
    return None


def temporal_attention(c: TemporalCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Positions in the place of frames, and each one's frames as its tokens and as its prompt."""
    B, T, S = c.q.shape[:3]
    T_k = c.k.shape[1]
    if c.packed is not None:
        tangents: Any = (None,) * 3 if "q" not in given else given["q"].unbind(3)
    else:
        tangents = [given.get(x) for x in "qkv"]
    q, k = prepared((c.q, tangents[0]), (c.k, tangents[1]), c.norm, c.rope, c.q_start, given)
    lengths = None if c.lengths is None else c.lengths.clamp(0, T_k).repeat_interleave(S).tolist()
    groups = native().prompt_groups(batch=B, frames=S, tokens=T, prompt=T_k, per_frame=True, lengths=lengths)
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)

    def turned(dual: Dual) -> Dual:
        return dual[0].transpose(1, 2), None if dual[1] is None else dual[1].transpose(1, 2)

    rest = (x.transpose(1, 2) for x in (out, lse, dout, dlse))
    run_tangents(groups, [Part(turned(q), turned(k), turned((c.v, tangents[2])), *rest)], c.scale)
    if c.lengths is not None:
        for b, n in enumerate(c.lengths.tolist()):  # frames past their sample's end
            dout[b, max(n - c.q_start, 0) :] = 0
            dlse[b, max(n - c.q_start, 0) :] = 0
    return dout, dlse
