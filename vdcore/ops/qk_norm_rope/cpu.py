"""QK-norm and rope on the CPU engine: csrc/cpu/qk_norm_rope.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, NormRope, capsule, native, why_not
from vdcore.ops.operator import recording
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.qk_norm_rope import QKNormRopeCall

_WEIGHTS = ("q_weight", "k_weight", "q_bias", "k_bias")


def _run_forward(
    q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, start: int, outputs: tuple[Tensor, Tensor]
) -> None:
    shared = NormRope(norm, rope)
    native().qk_norm_rope_forward(
        *map(capsule, (q, k, *outputs)), start, shared.norm, shared.rope, torch.get_num_threads()
    )


def _run_backward(
    q: Tensor,
    k: Tensor,
    norm: QKNorm | None,
    rope: Rope | None,
    start: int,
    grads: tuple[Tensor | None, ...],
    wanted: frozenset[str],
) -> Gradients:
    found: Gradients = {
        name: torch.zeros(x.shape, dtype=x.dtype) if dy is None else torch.empty(x.shape, dtype=x.dtype)
        for name, x, dy in (("q", q, grads[0]), ("k", k, grads[1]))
    }
    table = None if rope is None or not wanted & {"cos", "sin"} else rope.cos
    per_position = table is not None and table.shape[1] > 1
    B, T, S = q.shape[:3]
    units = S if per_position else B * T * S
    sums = bool(wanted & {*_WEIGHTS, "cos", "sin"})
    items = min(units, SUM_PARTS if sums else max(SUM_PARTS, 8 * torch.get_num_threads()))
    weights: list[Tensor | None] = [None] * 4
    if norm is not None:
        given = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
        for i, (name, weight) in enumerate(zip(_WEIGHTS, given)):
            if name in wanted and weight is not None:
                weights[i] = torch.zeros(items, weight.numel())
    tables: list[Tensor | None] = [None, None]
    if table is not None:
        shape = (table.shape[0], table.shape[1], table.shape[2] if table.ndim == 4 else 1, table.shape[-1])
        tables = [torch.zeros(1 if per_position else items, *shape) for _ in range(2)]

    shared = NormRope(norm, rope)
    native().qk_norm_rope_backward(
        *map(capsule, (q, k, *(None if dy is None else unit_stride(dy) for dy in grads), found["q"], found["k"])),
        *(start, shared.norm, shared.rope, torch.get_num_threads(), items, [capsule(x) for x in weights]),
        *map(capsule, tables),
    )
    for name, part in zip(_WEIGHTS, weights):
        if part is not None:
            found[name] = part.sum(0, dtype=torch.float64)
    for name, part in zip(("cos", "sin"), tables):
        if part is not None and table is not None:
            found[name] = part.sum(0, dtype=torch.float64).reshape(table.shape)
    return found


def _forward(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    outputs = c.empty_outputs()
    _run_forward(c.q, c.k, c.norm, c.rope, c.frame_start, outputs)
    return outputs


def _backward(
    c: QKNormRopeCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    return _run_backward(c.q, c.k, c.norm, c.rope, c.frame_start, grads, wanted)


def _why_not(c: QKNormRopeCall) -> str | None:
    return why_not(c.q)


NORM_ROPE = Implementation(_forward, _backward, _why_not)


class NormRopeBefore:
    """q and k ``(B, T, S, heads, D)`` on their way to the scores, and their gradients on the way back.

    Args:
        q_start: row of the rope table of the first query frame; the first key frame has row 0.
    """

    def __init__(self, q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, q_start: int = 0) -> None:
        self.q, self.k, self.norm, self.rope, self.q_start = q, k, norm, rope, q_start
        self._native = q.shape[:3] == k.shape[:3] and q_start == 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """In q's dtype."""
        if self.norm is None and self.rope is None:
            return self.q, self.k
        if self._native:
            outputs = torch.empty(self.q.shape, dtype=self.q.dtype), torch.empty(self.k.shape, dtype=self.k.dtype)
            _run_forward(self.q, self.k, self.norm, self.rope, 0, outputs)
            return outputs
        with torch.no_grad():
            return self._formula(self.q, self.k, self.norm, self.rope)

    def backward(self, dq: Tensor, dk: Tensor, wanted: frozenset[str]) -> Gradients:
        """Gradients of q, k and the ``wanted`` of q_weight, k_weight, q_bias, k_bias, cos, sin."""
        if self.norm is None and self.rope is None:
            return {"q": dq, "k": dk}
        if self._native:
            return _run_backward(self.q, self.k, self.norm, self.rope, 0, (dq, dk), wanted)
        leaves: dict[str, Tensor] = {"q": self.q.detach().requires_grad_(), "k": self.k.detach().requires_grad_()}

        def leaf(name: str, x: Tensor | None) -> Tensor | None:
            if x is None or name not in wanted:
                return x
            leaves[name] = x.detach().requires_grad_()
            return leaves[name]

        n, r = self.norm, self.rope
        with recording():
            if n is not None:
                weights = (leaf("q_weight", n.q_weight), leaf("k_weight", n.k_weight))
                n = QKNorm(*weights, n.kind, n.over, n.eps, leaf("q_bias", n.q_bias), leaf("k_bias", n.k_bias))
            if r is not None:
                r = Rope(leaf("cos", r.cos), leaf("sin", r.sin), r.style)  # type: ignore[arg-type]
            out = self._formula(leaves["q"], leaves["k"], n, r)
            found = torch.autograd.grad(out, list(leaves.values()), (dq, dk), allow_unused=True)
        return {
            name: torch.zeros(x.shape, dtype=x.dtype) if dx is None else dx.contiguous()
            for (name, x), dx in zip(leaves.items(), found)
        }

    def _formula(self, q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None) -> tuple[Tensor, Tensor]:
        dtype = q.dtype
        if norm is not None:
            q, k = norm.q(q), norm.k(k)
        if rope is not None:
            q, k = rope.rotate(q, self.q_start), rope.rotate(k)
        return q.to(dtype), k.to(dtype)
