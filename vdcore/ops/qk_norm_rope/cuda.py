"""Norm and rope alone, forward and backward: csrc/cuda/qk_norm_rope.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.cuda import NormRope, kernels, rows, stream, why_not, why_not_norm, why_not_rows
from vdcore.ops.native import capsule
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.qk_norm_rope import QKNormRopeCall

ROLES = {"q": 0, "k": 1}
WEIGHTS = ("q_weight", "k_weight", "q_bias", "k_bias")  # in the order of a row of sums
TABLE_WARPS = 4096  # that share the rows behind a rope table; every one writes a part of the gradient


def seen_by_scores(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None = None, start: int = 0) -> Tensor:
    """Queries (role ``"q"``) or keys as the scores see them: normed and rotated, contiguous."""
    if norm is None and rope is None:
        return x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        shared = NormRope(norm, rope)
        kernels().cuda_rows_norm_rope(
            *(capsule(x), capsule(y), start, ROLES[role], shared.norm, shared.rope, stream(x))
        )
    return y


def taken_back(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    start: int,
    wanted: frozenset[str],
    skips_zeros: bool,
) -> Gradients:
    """Fills dx, the gradient of x, from dy, that of :func:`seen_by_scores`.

    Args:
        wanted: names of the call's tensors.
        skips_zeros: a row whose gradients are all 0 takes no part, whatever x holds there.

    Returns:
        What x adds to the gradients of the wanted weights, biases, ``"cos"`` and ``"sin"``, float32.
    """
    found: Gradients = {}
    if not x.numel():
        return found
    shared, module = NormRope(norm, rope), kernels()
    arguments = (ROLES[role], shared.norm, shared.rope, skips_zeros, stream(x))
    names = {f"{role}_weight": 0, f"{role}_bias": 2}
    sums = None
    if norm is not None and wanted & names.keys():
        blocks = module.cuda_rows_backward_blocks(x.shape[:-1].numel())
        sums = torch.empty(blocks, 4, x.shape[-1], dtype=torch.float32, device=x.device)
    module.cuda_rows_norm_rope_backward(*map(capsule, (x, dy, dx, sums)), start, *arguments)
    if sums is not None:
        total = sums.sum(0)
        found = {name: total[part] for name, part in names.items() if name in wanted}
    if rope is not None and wanted & {"cos", "sin"}:
        table = rope.cos if rope.cos.ndim == 4 else rope.cos.unsqueeze(2)
        cells = [n if of_table > 1 else 1 for n, of_table in zip(x.shape[1:4], table.shape)]
        count = cells[0] * cells[1] * cells[2]
        behind = x.shape[:-1].numel() // count
        chunks = max(1, min(-(-behind // 8), TABLE_WARPS // count))
        partial = torch.empty(chunks, 2, count, table.shape[-1], dtype=torch.float32, device=x.device)
        module.cuda_rope_table_backward(*map(capsule, (x, dy, partial)), *cells, *arguments)
        for name, part in zip(("cos", "sin"), partial.sum(0)):
            whole = torch.zeros(table.shape, dtype=torch.float32, device=x.device)
            first = start if table.shape[0] > 1 else 0
            whole[first : first + cells[0]] = part.view(*cells, -1)
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
    return why_not(c.q) or why_not_rows(q=c.q, k=c.k) or why_not_norm(c.norm)


def _forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    return tuple(seen_by_scores(x, c.norm, role, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


def _backward(
    c: QKNormRopeCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    parts: list[Gradients] = []
    for role, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1])):
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else rows(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        more = taken_back(x, dy, dx, c.norm, role, c.rope, c.frame_start, wanted, False)
        parts += [{role: dx}, more]
    return add_up(*parts)


NORM_ROPE = Implementation(_forward, _backward, _why_not)
