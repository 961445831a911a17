"""Temporal attention: csrc/cuda/temporal_attention.cuh and temporal_attention_backward.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import TemporalCall, mask_numbers
from vdcore.backends.cuda._common import NormRope, capsule, kernels, rows, stream, why_not, why_not_norm, why_not_rows
from vdcore.backends.cuda.qk_norm_rope import seen_by_scores

MAX_FRAMES = 256


def hides(c: TemporalCall) -> bool:
    """Some frame may not see some other."""
    return c.lengths is not None or c.mask.past is not None or c.mask.future is not None


def why_not_temporal(c: TemporalCall) -> str | None:
    reason = why_not(c.q) or why_not_rows(q=c.q, k=c.k, v=c.v) or why_not_norm(c.norm)
    if reason is not None:
        return reason
    T_k, D = c.k.shape[1], c.q.shape[-1]
    if not kernels().cuda_temporal_fits(T_k, D):
        return f"it holds up to {MAX_FRAMES} key frames, or 32 beyond 128 channels; got {T_k} x {D}"
    return None if c.q.shape[1] < 2**31 else "it counts frames in 32 bits"


def moved_on_the_way(c: TemporalCall) -> bool:
    """Norm and rope happen in the kernel's registers, else in a pass of their own before it."""
    rope = c.rope
    turns = rope is None or (rope.style == "interleaved" and rope.cos.shape[-1] % 4 == 0)
    return turns and kernels().cuda_temporal_moves(c.k.shape[1], c.q.shape[-1])


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    q, k, norm, rope = c.q, c.k, c.norm, c.rope
    if (norm or rope) and not moved_on_the_way(c):
        q, k = seen_by_scores(q, norm, "q", rope, c.q_start), seen_by_scores(k, norm, "k", rope)
        norm = rope = None
    shared = NormRope(norm, rope)
    lengths = None if c.lengths is None else c.lengths.contiguous()
    kernels().cuda_temporal_attention_forward(
        *map(capsule, (q, k, c.v, out, lse, lengths)),
        *(mask_numbers(c.mask), c.q_start, hides(c), c.scale, shared.norm, shared.rope, stream(q)),
    )


def _forward(c: TemporalCall) -> tuple[Tensor, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse if c.lse else None)
    return out, lse


def _why_not_backward(c: TemporalCall) -> str | None:
    if c.norm is not None or c.rope is not None:
        return "its backward has no norm and no rope"
    if c.q.shape[3] != c.k.shape[3]:
        return "its backward has no grouped heads"
    frames, D = max(c.q.shape[1], c.k.shape[1]), c.q.shape[-1]
    if not kernels().cuda_temporal_backward_fits(frames, D):
        return f"its backward holds 64 frames of 128 channels, or 128 of 64; got {frames} x {D}"
    return None


def _backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    out, _ = outputs
    dout = torch.zeros_like(out) if grads[0] is None else rows(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    found: Gradients
    if c.packed is not None:
        found = {"q": torch.empty(c.packed.shape, dtype=c.packed.dtype, device=c.packed.device)}
        gradients = found["q"].unbind(3)
    else:
        found = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in zip("qkv", (c.q, c.k, c.v))}
        gradients = tuple(found.values())
    lengths = None if c.lengths is None else c.lengths.contiguous()
    kernels().cuda_temporal_attention_backward(
        *map(capsule, (c.q, c.k, c.v, lengths)),
        *(mask_numbers(c.mask), c.q_start, hides(c), c.scale),
        *map(capsule, (dout, dlse, *gradients)),
        stream(c.q),
    )
    return found


OPERATORS = {"temporal_attention": Implementation(_forward, _backward, why_not_temporal, _why_not_backward)}
