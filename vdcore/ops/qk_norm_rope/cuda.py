"""Norm and RoPE alone, forward and backward: csrc/cuda/qk_norm_rope."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.cuda import kernels, norm_rope, rows, stream, why_not, why_not_norm, why_not_rows
from vdcore.ops.native import capsule
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.qk_norm_rope import QKNormRopeCall

ROLES = {"q": 0, "k": 1}
WEIGHTS = ("q_weight", "k_weight", "q_bias", "k_bias")  # in the order of a row of sums
TABLE_WARPS = 4096  # that share the rows behind a rope table; every one writes a part of the gradient


def _rows(x: Tensor, role: str, norm: QKNorm | None, rope: Rope | None, start: int) -> Tensor:
    """Queries (role ``"q"``) or keys after norm and RoPE, contiguous; ``start``: row of the table of frame 0."""
    if norm is None and rope is None:
        return x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        kernels().rows_norm_rope(
            x=capsule(x), y=capsule(y), frame_start=start, role=ROLES[role], stream=stream(x), **norm_rope(norm, rope)
        )
    return y


def normalized_rotated(
    q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None = None, q_start: int = 0
) -> tuple[Tensor, Tensor]:
    """q and k after norm and RoPE, contiguous."""
    return _rows(q, "q", norm, rope, q_start), _rows(k, "k", norm, rope, 0)


def norm_rope_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    *,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    start: int,
    wanted: frozenset[str],
    skips_zeros: bool,
) -> Gradients:
    """Fills dx, the gradient of x, from dy, that of x after norm and RoPE.

    Args:
        role: ``"q"`` or ``"k"``.
        start: row of the table of frame 0.
        wanted: names of the call's tensors.
        skips_zeros: a row whose gradients are all 0 takes no part, whatever x holds there.

    Returns:
        What x adds to the gradients of the wanted weights, biases, ``"cos"`` and ``"sin"``, float32.
    """
    found: Gradients = {}
    if not x.numel():
        return found
    module = kernels()
    arguments = {
        "x": capsule(x),
        "dy": capsule(dy),
        "role": ROLES[role],
        "skips_zeros": skips_zeros,
        "stream": stream(x),
        **norm_rope(norm, rope),
    }
    names = {f"{role}_weight": 0, f"{role}_bias": 2}
    sums = None
    if norm is not None and wanted & names.keys():
        blocks = module.rows_backward_blocks(rows=x.shape[:-1].numel())
        sums = torch.empty(blocks, 4, x.shape[-1], dtype=torch.float32, device=x.device)
    module.rows_norm_rope_backward(dx=capsule(dx), sums=capsule(sums), frame_start=start, **arguments)
    if sums is not None:
        total = sums.sum(0)
        found = {name: total[part] for name, part in names.items() if name in wanted}
    if rope is not None and wanted & {"cos", "sin"}:
        table = rope.cos if rope.cos.ndim == 4 else rope.cos.unsqueeze(2)
        frames, tokens, heads = (n if of_table > 1 else 1 for n, of_table in zip(x.shape[1:4], table.shape))
        count = frames * tokens * heads
        rows_per_cell = x.shape[:-1].numel() // count
        chunks = max(1, min(-(-rows_per_cell // 8), TABLE_WARPS // count))
        partial = torch.empty(chunks, 2, count, table.shape[-1], dtype=torch.float32, device=x.device)
        module.rope_table_backward(partial=capsule(partial), frames=frames, tokens=tokens, heads=heads, **arguments)
        for name, part in zip(("cos", "sin"), partial.sum(0)):
            whole = torch.zeros(table.shape, dtype=torch.float32, device=x.device)
            first = start if table.shape[0] > 1 else 0
            whole[first : first + frames] = part.view(frames, tokens, heads, -1)
            found[name] = whole.view(rope.cos.shape)
    return found


def add_up(*parts: Gradients) -> Gradients:
    """The parts' gradients; summed where several have one."""
    found: Gradients = {}
    for part in parts:
        for name, x in part.items():
            found[name] = found[name] + x if name in found else x
    return found


def _why_not(c: QKNormRopeCall) -> str | None:
    reason = why_not(c.q) or why_not_rows(q=c.q, k=c.k) or why_not_norm(c.norm)
    if reason is None and max(x.shape[:-1].numel() for x in (c.q, c.k)) >= 2**31:
        return "it counts rows in 32 bits"
    return reason


def _forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    return tuple(_rows(x, role, c.norm, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


def _backward(
    c: QKNormRopeCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    parts: list[Gradients] = []
    for role, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1])):
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else rows(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        how: dict[str, Any] = {"norm": c.norm, "rope": c.rope, "start": c.frame_start}
        parts += [{role: dx}, norm_rope_backward(x, dy, dx, role=role, wanted=wanted, skips_zeros=False, **how)]
    return add_up(*parts)


NORM_ROPE = Implementation(_forward, _backward, _why_not)
