"""QK-norm and rope on the CPU engine: csrc/cpu/qk_norm_rope."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import SUM_PARTS, capsule, native, norm_of, rope_of, why_not
from vdcore.ops.operator import recording
from vdcore.rope import Rope

if TYPE_CHECKING:
    from vdcore.ops.qk_norm_rope import QKNormRopeCall

WEIGHTS = ("q_weight", "k_weight", "q_bias", "k_bias")


class SharedGradients:
    """Gradients of norm weights and rope tables, which positions share: summed in parts, then over the parts."""

    def __init__(self, norm: QKNorm | None, rope: Rope | None, wanted: frozenset[str]) -> None:
        self._weights: list[Tensor | None] = [None] * 4
        self._sums: dict[str, Tensor | None] = {}
        self._table: Tensor | None = None
        self.per_position = self.wanted = False
        if norm is None and rope is None:
            return
        if norm is not None and not wanted.isdisjoint(WEIGHTS):
            given = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
            self._weights = [x if name in wanted else None for name, x in zip(WEIGHTS, given)]
        self._table = None if rope is None or wanted.isdisjoint(("cos", "sin")) else rope.cos
        self.per_position = self._table is not None and self._table.shape[1] > 1  # a position's row is its own
        self.wanted = self._table is not None or any(x is not None for x in self._weights)

    def arguments(self, parts: int) -> dict[str, Any]:
        """The number of parts, and room for them: as the native module takes it."""
        if not self.wanted:
            return {"items": parts, "weight_sums": self._weights, "dcos": None, "dsin": None}
        tables: list[Tensor | None] = [None, None]
        if self._table is not None:
            shape = (self._table if self._table.ndim == 4 else self._table.unsqueeze(2)).shape
            tables = [torch.zeros(1 if self.per_position else parts, *shape) for _ in range(2)]
        weights = [None if x is None else torch.zeros(parts, x.numel()) for x in self._weights]
        self._sums = dict(zip((*WEIGHTS, "cos", "sin"), (*weights, *tables)))
        dcos, dsin = map(capsule, tables)
        return {"items": parts, "weight_sums": [capsule(x) for x in weights], "dcos": dcos, "dsin": dsin}

    def total(self) -> Gradients:
        found = {name: x.sum(0, dtype=torch.float64) for name, x in self._sums.items() if x is not None}
        if self._table is not None:
            found |= {name: found[name].reshape(self._table.shape) for name in ("cos", "sin")}
        return found


def _shared(norm: QKNorm | None, rope: Rope | None, start: int) -> dict[str, Any]:
    """What both directions of the engine take beside their tensors."""
    return {"frame_start": start, "norm": norm_of(norm), "rope": rope_of(rope), "threads": torch.get_num_threads()}


def _run_forward(
    q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, start: int, outputs: tuple[Tensor, Tensor]
) -> None:
    q_out, k_out = outputs
    native().qk_norm_rope_forward(
        q=capsule(q), k=capsule(k), q_out=capsule(q_out), k_out=capsule(k_out), **_shared(norm, rope, start)
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
    B, T, S = q.shape[:3]
    sums = SharedGradients(norm, rope, wanted)
    units = S if sums.per_position else B * T * S
    parts = min(units, SUM_PARTS if sums.wanted else max(SUM_PARTS, 8 * torch.get_num_threads()))
    dq_out, dk_out = (None if dy is None else unit_stride(dy) for dy in grads)
    native().qk_norm_rope_backward(
        q=capsule(q),
        k=capsule(k),
        dq_out=capsule(dq_out),
        dk_out=capsule(dk_out),
        dq=capsule(found["q"]),
        dk=capsule(found["k"]),
        **_shared(norm, rope, start),
        **sums.arguments(parts),
    )
    return found | sums.total()


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


def normed_tangents(q: Tensor, k: Tensor, norm: QKNorm, given: list[Tensor | None]) -> list[Tensor | None]:
    """Of q and k, normed: of a norm without weights the Jacobian is symmetric, so that its backward is its tangent."""
    bare = replace(norm, q_weight=None, k_weight=None, q_bias=None, k_bias=None)
    moved = tuple(None if dx is None else unit_stride(dx) for dx in given)
    found = _run_backward(q, k, bare, None, 0, moved, frozenset())
    for name, weight in (("q", norm.q_weight), ("k", norm.k_weight)):
        if weight is not None:
            found[name].mul_(weight.view(-1, q.shape[-1]))
    return [None if dx is None else found[name] for name, dx in zip("qk", given)]


def rotated(tensors: list[Tensor], rope: Rope) -> list[Tensor]:
    """One or two tensors ``(B, T, S, heads, D)`` of a dtype, rotated from row 0 of a table that heads share."""
    tensors = [unit_stride(x) for x in tensors]
    q, k = tensors[0], tensors[1] if len(tensors) > 1 else tensors[0][..., :1, :]
    found = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    _run_forward(q, k, None, rope, 0, found)
    return list(found[: len(tensors)])


NORM_ROPE = Implementation(_forward, _backward, _why_not)


class NormRopeBefore:
    """q and k ``(B, T, S, heads, D)`` on their way to the scores, and their gradients on the way back.

    Args:
        q_start: row of the rope table of the first query frame; the first key frame has row 0.
    """

    def __init__(self, q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, q_start: int = 0) -> None:
        self.q, self.k, self.norm, self.rope, self.q_start = q, k, norm, rope, q_start
        self.on_engine = q.shape[:3] == k.shape[:3] and q_start == 0 and q.numel() > 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """In q's dtype."""
        if self.norm is None and self.rope is None:
            return self.q, self.k
        if self.on_engine:
            outputs = torch.empty(self.q.shape, dtype=self.q.dtype), torch.empty(self.k.shape, dtype=self.k.dtype)
            _run_forward(self.q, self.k, self.norm, self.rope, 0, outputs)
            return outputs
        with torch.no_grad():
            return self._formula(self.q, self.k, self.norm, self.rope)

    def backward(self, dq: Tensor, dk: Tensor, wanted: frozenset[str]) -> Gradients:
        """Gradients of q, k and the ``wanted`` of q_weight, k_weight, q_bias, k_bias, cos, sin."""
        if self.norm is None and self.rope is None:
            return {"q": dq, "k": dk}
        if self.on_engine:
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
