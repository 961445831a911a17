"""Temporal attention: csrc/cuda/temporal_attention*.cuh, of which the _long ones are for long lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.ops.call import mask_numbers
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.cuda import NormRope, int64, kernels, rows, stream, why_not, why_not_norm, why_not_rows
from vdcore.ops.native import capsule
from vdcore.ops.qk_norm_rope.cuda import WEIGHTS, add_up, seen_by_scores, taken_back

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall

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


def pairs_of_a_lane(c: TemporalCall) -> bool:
    """Rope turns neighbours, and tables can be read as 16 bytes."""
    return c.rope is None or (c.rope.style == "interleaved" and c.rope.cos.shape[-1] % 4 == 0)


def moved_on_the_way(c: TemporalCall) -> bool:
    """Norm and rope happen in the kernel's registers, else in a pass of their own before it."""
    return pairs_of_a_lane(c) and kernels().cuda_temporal_moves(c.k.shape[1], c.q.shape[-1])


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    q, k, norm, rope = c.q, c.k, c.norm, c.rope
    if (norm or rope) and not moved_on_the_way(c):
        q, k = seen_by_scores(q, norm, "q", rope, c.q_start), seen_by_scores(k, norm, "k", rope)
        norm = rope = None
    shared = NormRope(norm, rope)
    lengths = int64(c.lengths)
    kernels().cuda_temporal_attention_forward(
        *map(capsule, (q, k, c.v, out, lse, lengths)),
        *(mask_numbers(c.mask), c.q_start, hides(c), c.scale, shared.norm, shared.rope, stream(q)),
    )


def _forward(c: TemporalCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


def _lines(c: TemporalCall) -> tuple[int, int, int, int]:
    """Query and key frames, channels, query heads a key head."""
    return c.q.shape[1], c.k.shape[1], c.q.shape[-1], c.q.shape[3] // max(c.k.shape[3], 1)


def _why_not_backward(c: TemporalCall) -> str | None:
    T, T_k, D, R = _lines(c)
    if kernels().cuda_temporal_backward_fits(T, T_k, D, R):
        return None
    return (
        f"its backward holds up to {MAX_FRAMES} frames, or 32 beyond 128 channels, of all query heads that share a key "
        f"head in 160 KiB; got {T} query and {T_k} key frames x {D}, {R} heads"
    )


def _empty_gradients(c: TemporalCall) -> tuple[Gradients, tuple[Tensor, ...]]:
    """By name, and as the kernels fill them: slices of a packed one."""
    if c.packed is not None:
        found = {"q": torch.empty(c.packed.shape, dtype=c.packed.dtype, device=c.packed.device)}
        return found, found["q"].unbind(3)
    found = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in zip("qkv", (c.q, c.k, c.v))}
    return found, tuple(found.values())


def _backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    out, lse = outputs
    dout = torch.zeros_like(out) if grads[0] is None else rows(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    found, (dq, dk, dv) = _empty_gradients(c)
    moves = c.norm is not None or c.rope is not None
    # Norm and rope are taken back in registers too, but for the tables' gradients, which sum over heads and positions.
    module = kernels()
    on_the_way = moves and pairs_of_a_lane(c) and module.cuda_temporal_backward_moves(c.q.shape[-1])
    on_the_way = on_the_way and not wanted & {"cos", "sin"}
    shared = NormRope(c.norm, c.rope) if on_the_way else NormRope(None, None)
    q, k, dq_seen, dk_seen = c.q, c.k, dq, dk
    if moves and not on_the_way:
        q, k = seen_by_scores(q, c.norm, "q", c.rope, c.q_start), seen_by_scores(k, c.norm, "k", c.rope)
        dq_seen, dk_seen = torch.empty_like(q), torch.empty_like(k)
    learned = [name for name in WEIGHTS if name in wanted]
    sums = None
    if on_the_way and learned:
        blocks = module.cuda_temporal_backward_blocks(*_lines(c), c.q.shape[:-1].numel() // c.q.shape[1])
        sums = torch.empty(blocks, 4, c.q.shape[-1], dtype=torch.float32, device=q.device)
    lengths = int64(c.lengths)
    module.cuda_temporal_attention_backward(
        *map(capsule, (q, k, c.v, out, lse, lengths)),
        *(mask_numbers(c.mask), c.q_start, hides(c), c.scale, shared.norm, shared.rope),
        *map(capsule, (dout, dlse, dq_seen, dk_seen, dv, sums)),
        stream(q),
    )
    if sums is not None:
        total = sums.sum(0)
        return {**found, **{name: total[WEIGHTS.index(name)] for name in learned}}
    if not moves or on_the_way:
        return found
    # A row that takes part in nothing has gradients 0, and may hold anything.
    more = [
        taken_back(c.q, dq_seen, dq, c.norm, "q", c.rope, c.q_start, wanted, True),
        taken_back(c.k, dk_seen, dk, c.norm, "k", c.rope, 0, wanted, True),
    ]
    return {**found, **add_up(*more)}


TEMPORAL = Implementation(_forward, _backward, why_not_temporal, _why_not_backward)
