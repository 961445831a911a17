"""Attention of video tokens to text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import CrossCall
from vdcore.norm import QKNorm
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run
from vdcore.ops.temporal_attention import norm_rope_tensors

OP = "cross_attention"


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every video token attends to the text of its sample or of its frame.

    Args:
        q: ``(B, T, S, H, D)``.
        k, v: ``(B, L, G, D)``, or ``(B, T, L, G, D)`` with a prompt for every frame; G divides H.
        lengths: ``(B,)`` or ``(B, T)``, valid text tokens, whichever shape k and v have; below 0 counts as 0, above L
            as L. With 0 the output is 0.
        scale, norm, return_lse, backend: as in :func:`temporal_attention`.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous; with ``return_lse`` also lse, float32 ``(B, T, S, H)``.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    call = _prepare(q, k, v, lengths=lengths, scale=scale, norm=norm, return_lse=return_lse)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def _prepare(
    q: Any, k: Any, v: Any, *, lengths: Any = None, scale: Any = None, norm: Any = None, return_lse: bool = False
) -> CrossCall:
    q, k, v = check.autocast(*(check.check_tensor(OP, name, x) for name, x in zip("qkv", (q, k, v))))
    q = check.unit_stride(check.check_main(OP, "q", q, "(B, T, S, H, D)"))
    B, T, _, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        check.check_like(OP, name, x, q, "q")
        if x.ndim not in (4, 5):
            check.wrong(OP, name, "(B, L, G, D) or (B, T, L, G, D)", check.shape_of(x))
    lead, dims = ((B,), "(B, L, G, D)") if k.ndim == 4 else ((B, T), "(B, T, L, G, D)")
    check.check_shape(OP, "k", k, (*lead, *k.shape[-3:-1], D), dims)
    check.check_shape(OP, "v", v, tuple(k.shape), "the shape of k")
    G = k.shape[-2]
    check.check_groups(OP, "k", G, H)
    k, v = check.unit_stride(k), check.unit_stride(v)
    norm = check.check_norm(OP, norm, q, H, G, D)
    lengths = check.check_lengths(OP, "lengths", lengths, [(B,), (B, T)], "(B,) or (B, T)", q)
    grad = check.wants_grad(q, k, v, *norm_rope_tensors(norm, None))
    return CrossCall(OP, grad, q, k, v, lengths, check.check_scale(OP, scale, D), norm, bool(return_lse))


register(OP, CrossCall, _prepare)
