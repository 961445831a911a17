"""Oracle of cross attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.temporal_attention.reference import attend, heads_first, keep


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None, scale: float, norm: QKNorm | None
) -> tuple[Tensor, Tensor]:
    """Video tokens attend to text: q ``(B, T, S, H, D)``, k and v ``(B, L, G, D)`` or ``(B, T, L, G, D)``.

    ``lengths`` ``(B,)`` or ``(B, T)``: valid text tokens. Returns out as q and lse ``(B, T, S, H)``.
    """
    B, T, S, H, D = q.shape
    dtype = compute_dtype(q.dtype)
    per_frame = k.ndim == 5
    L = k.shape[-3]
    valid = torch.full((B, 1), L) if lengths is None else lengths.cpu().clamp(0, L)
    valid = (valid if valid.ndim == 2 else valid[:, None]).expand(B, T)
    # Text that nobody reads must not reach the gradient of a shared weight.
    read = valid if per_frame else valid.amax(1) if T else torch.zeros(B, dtype=torch.long)
    k = keep(k, torch.arange(L) < read[..., None]).to(dtype)
    qr, vr = keep(q, valid > 0).to(dtype), v.to(dtype)
    if norm is not None:
        qr, k = norm.q(qr), norm.k(k)
    out, lse = [], []
    for b in range(B):
        for t in range(T):
            n = int(valid[b, t])
            keys, values = (x[b, t, :n] if per_frame else x[b, :n] for x in (k, vr))
            o, s = attend(qr[b, t].transpose(0, 1), heads_first(keys, H), heads_first(values, H), scale)
            out.append(o.transpose(0, 1))
            lse.append(s.transpose(0, 1))
    if not out:
        return q.new_zeros(q.shape), qr.new_zeros(q.shape[:-1])
    return torch.stack(out).reshape(q.shape).to(q.dtype), torch.stack(lse).reshape(q.shape[:-1])
