"""Temporal attention: csrc/cuda/temporal_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdcore.ops.call import mask_numbers
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.cuda import (
    int64,
    kernels,
    most_shared_memory,
    norm_rope,
    rows,
    stream,
    why_not,
    why_not_mask,
    why_not_norm,
    why_not_rows,
)
from vdcore.ops.native import capsule
from vdcore.ops.qk_norm_rope.cuda import WEIGHTS, add_up, norm_rope_backward, normalized_rotated
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.temporal_attention import TemporalCall

MAX_FRAMES = 256


def why_not_temporal(c: TemporalCall) -> str | None:
    if c.bias is not None:
        return "its kernels know no bias"
    reason = why_not(c.q) or why_not_mask(c.mask) or why_not_rows(q=c.q, k=c.k, v=c.v) or why_not_norm(c.norm)
    if reason is not None:
        return reason
    T, T_k, D = c.q.shape[1], c.k.shape[1], c.q.shape[-1]
    if not kernels().temporal_fits(queries=T, keys=T_k, channels=D):
        held = f"it holds up to {MAX_FRAMES} key frames, or 32 query and key frames beyond 128 channels"
        return f"{held}; got {T} and {T_k} x {D}"
    if c.q_start + c.q.shape[1] >= 2**31 or c.q.shape[:-1].numel() >= 2**31:
        return "it counts frames and sequences in 32 bits"
    return None


def _lanes_hold_pairs(c: TemporalCall) -> bool:
    """RoPE rotates neighbouring channels, and tables can be read as 16 bytes."""
    return c.rope is None or (c.rope.style == "interleaved" and c.rope.cos.shape[-1] % 4 == 0)


def _whole_table(c: TemporalCall) -> Rope | None:
    """The table as fused kernels read it: pairs for all channels of a head, 1 and 0 for those that do not rotate."""
    pairs = c.q.shape[-1] // 2
    if c.norm is None and c.rope is None:
        return None
    if c.rope is None:
        cos = torch.ones(1, 1, pairs, dtype=torch.float32, device=c.q.device)
        return Rope(cos, torch.zeros_like(cos))
    missing = pairs - c.rope.cos.shape[-1]
    if missing == 0:
        return c.rope
    return Rope(pad(c.rope.cos, (0, missing), value=1.0), pad(c.rope.sin, (0, missing)))


def _arguments(
    c: TemporalCall, q: Tensor, k: Tensor, out: Tensor, lse: Tensor | None, fuses_norm_rope: bool
) -> dict[str, Any]:
    """What both directions take; q and k after norm and RoPE where the kernel does not fuse them."""
    return {
        "q": capsule(q),
        "k": capsule(k),
        "v": capsule(c.v),
        "out": capsule(out),
        "lse": capsule(lse),
        "lengths": int64(c.lengths),
        "mask": mask_numbers(c.mask),
        "q_start": c.q_start,
        "masked": c.lengths is not None or c.mask.past is not None or c.mask.future is not None,
        "scale": c.scale,
        "stream": stream(q),
        **(norm_rope(c.norm, _whole_table(c)) if fuses_norm_rope else norm_rope(None, None)),
    }


def run_forward(c: TemporalCall, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and lse."""
    q, k = c.q, c.k
    sizes = {"queries": q.shape[1], "keys": k.shape[1], "channels": q.shape[-1]}
    fuses_norm_rope = _lanes_hold_pairs(c) and kernels().temporal_fuses_norm_rope(**sizes)
    if not fuses_norm_rope:
        q, k = normalized_rotated(q, k, c.norm, c.rope, c.q_start)
    kernels().temporal_attention_forward(**_arguments(c, q, k, out, lse, fuses_norm_rope))


def _forward(c: TemporalCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


def _sizes(c: TemporalCall) -> dict[str, int]:
    """Of a sequence; ``shared``: query heads per key head."""
    T, T_k, D, shared = c.q.shape[1], c.k.shape[1], c.q.shape[-1], c.q.shape[3] // max(c.k.shape[3], 1)
    return {"queries": T, "keys": T_k, "channels": D, "shared": shared}


def _why_not_backward(c: TemporalCall) -> str | None:
    sizes = _sizes(c)
    most = most_shared_memory(c.q.device)
    if kernels().temporal_backward_fits(**sizes, most=most):
        return None
    T, T_k, D, R = sizes.values()
    return (
        f"its backward holds up to {MAX_FRAMES} frames, or 32 beyond 128 channels, of all query heads that share a key "
        f"head in {most >> 10} KiB of shared memory; got {T} query and {T_k} key frames x {D}, {R} heads"
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
    module = kernels()
    # The norm/RoPE backward is fused too, but for the tables' gradients, which sum over heads and positions.
    has_norm_rope = c.norm is not None or c.rope is not None
    fuses_norm_rope = has_norm_rope and _lanes_hold_pairs(c) and not wanted & {"cos", "sin"}
    fuses_norm_rope = fuses_norm_rope and module.temporal_backward_fuses_norm_rope(c.q.shape[-1])
    q, k, dq_kernel, dk_kernel = c.q, c.k, dq, dk
    if has_norm_rope and not fuses_norm_rope:
        q, k = normalized_rotated(q, k, c.norm, c.rope, c.q_start)
        dq_kernel, dk_kernel = torch.empty_like(q), torch.empty_like(k)
    learned = [name for name in WEIGHTS if name in wanted]
    sums = None
    if fuses_norm_rope and learned:
        blocks = module.temporal_backward_blocks(sequences=q.shape[:-1].numel() // q.shape[1], **_sizes(c))
        sums = torch.empty(blocks, 4, q.shape[-1], dtype=torch.float32, device=q.device)
    module.temporal_attention_backward(
        dout=capsule(dout),
        dlse=capsule(dlse),
        dq=capsule(dq_kernel),
        dk=capsule(dk_kernel),
        dv=capsule(dv),
        sums=capsule(sums),
        **_arguments(c, q, k, out, lse, fuses_norm_rope),
    )
    if sums is not None:
        total = sums.sum(0)
        return {**found, **{name: total[WEIGHTS.index(name)] for name in learned}}
    if not has_norm_rope or fuses_norm_rope:
        return found
    # A row that takes part in nothing has gradients 0, and may hold anything.
    how: dict[str, Any] = {"norm": c.norm, "rope": c.rope, "wanted": wanted, "skips_zeros": True}
    more = [
        norm_rope_backward(c.q, dq_kernel, dq, role="q", start=c.q_start, **how),
        norm_rope_backward(c.k, dk_kernel, dk, role="k", start=0, **how),
    ]
    return {**found, **add_up(*more)}


TEMPORAL = Implementation(_forward, _backward, why_not_temporal, _why_not_backward)
