"""torch's own attention as a backend: dense attention over one run of keys, by slicing, never by a mask.

A mask would let NaN from hidden rows through (0 * NaN) and cost work for pairs that nobody sees. So a call qualifies
when its query frames all see the same run of frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.mask import Run
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.operator import by_autograd


def _forward_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Dense attention on (N, H, n, D); lse (N, H, n)."""
    if q.device.type == "cpu":
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return out, log_sum_exp
    return F.scaled_dot_product_attention(q, k, v, scale=scale), None


def _backward_one(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = run(dout, q, k, v, out, lse, 0.0, False, scale=scale)
    if dlse is not None:
        # d lse_i / d score_ij = P_ij: an attention with k in v's place, and the P^T product that dv is.
        weight = (scale * dlse)[..., None].to(q.dtype)
        dq = dq + weight * _forward_one(q, k, k, scale)[0]
        dk = dk + run((weight * q).contiguous(), q, k, v, out, lse, 0.0, False, scale=scale)[2]
    return dq, dk, dv


def shared_run(c: Any) -> Run | None:
    """The one run of key frames that all query frames see, if there is one."""
    runs = set(c.mask.runs(c.q.shape[1], c.k.shape[1], c.q_start))
    if len(runs) != 1:
        return None
    (only,) = runs
    return only[0] if len(only) == 1 else None


class Dense:
    """A call as dense problems: views of its tensors, and the way back. Operators say here where they differ."""

    def why_not(self, c: Any) -> str | None:
        if c.q.dtype == torch.float64:
            return "float64 goes to the reference"
        if c.q.device.type not in ("cpu", "cuda"):
            return f"it is not set up for {c.q.device.type}"
        if c.q.shape[-2] != c.k.shape[-2]:
            return "torch copies grouped keys and values for every query head"
        if c.q.device.type == "cuda" and (c.return_lse or c.grad):
            return "on CUDA torch's fused backward is not deterministic, and its forward does not hand out lse"
        if c.return_lse and c.q.dtype != torch.float32:
            return f"torch's lse of {c.q.dtype} inputs errs many times as much as the tolerance rule allows"
        if c.lengths is not None:
            return "lengths would need a mask"
        return self.why_not_keys(c)

    def why_not_keys(self, c: Any) -> str | None:
        if shared_run(c) is None:
            return "its frames do not all see the same run of frames, which would need a mask"
        return None

    def inputs(self, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the scores see them, in q's dtype."""
        first, end = shared_run(c) or (0, 0)
        return self.norm_rope(c, c.k[:, first:end], c.v[:, first:end], first)

    @staticmethod
    def norm_rope(c: Any, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and rope, with the first key frame's row of the rope table."""
        q = c.q
        if c.norm is not None:
            q, k = c.norm.q(q), c.norm.k(k)
        if c.rope is not None:
            q, k = c.rope.rotate(q, c.q_start), c.rope.rotate(k, first)
        return q.to(c.q.dtype), k.to(c.q.dtype), v

    def split(self, c: Any, x: Tensor, *, keys: bool = False) -> list[Tensor]:
        """Views ``(N, heads, n, D)`` of a tensor of the shape of q, or of k and v."""
        return [x.flatten(1, 2).transpose(1, 2)]

    def join(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """The reverse: the contiguous tensor of this shape."""
        return parts[0].transpose(1, 2).reshape(shape).contiguous()

    def forward(self, c: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            q, k, v = self.inputs(c)
        triples = zip(self.split(c, q), self.split(c, k, keys=True), self.split(c, v, keys=True))
        parts = [_forward_one(*triple, c.scale) for triple in triples]
        out, lse = c.empty_outputs()
        out = self.join([o for o, _ in parts], q.shape).view(out.shape)
        if lse is not None:
            rows = [x[..., None] for _, x in parts if x is not None]
            lse = self.join(rows, torch.Size((*q.shape[:-1], 1))).view(lse.shape)
        return out, lse

    def backward(
        self, c: Any, outputs: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
    ) -> Gradients:
        shape, rows = c.q.shape, c.q.shape[:-1]
        dout, dlse = grads

        @torch.no_grad()
        def grads_of(seen: tuple[Tensor, ...]) -> list[Tensor]:
            qs, ks, vs = (self.split(c, x.detach(), keys=i > 0) for i, x in enumerate(seen))
            out = self.split(c, outputs[0].view(shape))
            douts = self.split(c, (torch.zeros_like(outputs[0]) if dout is None else dout).reshape(shape))
            lse = [x[..., 0].contiguous() for x in self.split(c, outputs[1].view(rows)[..., None])]
            dlses: list[Any] = [None] * len(lse)
            if dlse is not None:
                dlses = [x[..., 0] for x in self.split(c, dlse.reshape(rows)[..., None])]
            parts = [
                _backward_one(qs[i], ks[i], vs[i], out[i], lse[i], douts[i], dlses[i], c.scale) for i in range(len(qs))
            ]
            return [self.join([part[i] for part in parts], x.shape) for i, x in enumerate(seen)]

        return by_autograd(c, wanted, self.inputs, grads_of)

    def implementation(self) -> Implementation:
        return Implementation(self.forward, self.backward, self.why_not)


class _Temporal(Dense):
    """One problem per sample: batch and positions do not merge into a view."""

    def why_not_keys(self, c: Any) -> str | None:
        return super().why_not_keys(c) if c.bias is None else "a bias would need a mask"

    def split(self, c: Any, x: Tensor, *, keys: bool = False) -> list[Tensor]:
        return [one.permute(1, 2, 0, 3) for one in x]

    def join(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        whole = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
        for one, part in zip(whole, parts):
            one.copy_(part.permute(2, 0, 1, 3))
        return whole


TEMPORAL = _Temporal().implementation()
