"""Norm and rope before a kernel that has none, and back through them."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.backends.base import Gradients, recording
from vdcore.backends.call import QKNormRopeCall
from vdcore.backends.cpu import qk_norm_rope
from vdcore.norm import QKNorm
from vdcore.rope import Rope


class NormRopeBefore:
    """q and k ``(B, T, S, heads, D)`` on their way to the scores, and their gradients on the way back.

    Args:
        q_start: row of the rope table of the first query frame; the first key frame has row 0.
    """

    def __init__(self, q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, q_start: int = 0) -> None:
        self.q, self.k, self.norm, self.rope, self.q_start = q, k, norm, rope, q_start
        self._call: QKNormRopeCall | None = None
        if q.shape[:3] == k.shape[:3] and q_start == 0:
            self._call = QKNormRopeCall("qk_norm_rope", False, q, k, norm, rope, 0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """In q's dtype."""
        if self.norm is None and self.rope is None:
            return self.q, self.k
        if self._call is not None:
            q, k = qk_norm_rope.run_forward(self._call)
            return q, k
        with torch.no_grad():
            return self._formula(self.q, self.k, self.norm, self.rope)

    def backward(self, dq: Tensor, dk: Tensor, wanted: frozenset[str]) -> Gradients:
        """Gradients of q, k and the ``wanted`` of q_weight, k_weight, q_bias, k_bias, cos, sin."""
        if self.norm is None and self.rope is None:
            return {"q": dq, "k": dk}
        if self._call is not None:
            return qk_norm_rope.run_backward(self._call, (), (dq, dk), wanted)
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
