"""QK-norm and rotary embedding in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import QKNormRopeCall
from vdcore.norm import QKNorm
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run
from vdcore.ops.temporal_attention import norm_rope_tensors
from vdcore.rope import Rope

OP = "qk_norm_rope"


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    frame_start: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms, then rotates queries and keys, for keys that are kept: frame ``t`` uses row ``frame_start + t``.

    Args:
        q: ``(B, T, S, H, D)``.
        k: ``(B, T, S, G, D)``.
        norm, rope: as in :func:`temporal_attention`.
        frame_start: index of the first frame in the rope table.
        backend: run on this one or raise.

    Returns:
        q and k in their dtype and shape, contiguous.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    q, k = run(_prepare(q, k, norm=norm, rope=rope, frame_start=frame_start), backend)
    return q, k


def _prepare(q: Any, k: Any, *, norm: Any = None, rope: Any = None, frame_start: Any = 0) -> QKNormRopeCall:
    q = check.unit_stride(check.check_main(OP, "q", q, "(B, T, S, H, D)"))
    k = check.unit_stride(check.check_main(OP, "k", k, "(B, T, S, G, D)"))
    check.check_like(OP, "k", k, q, "q")
    B, T, S, H, D = q.shape
    check.check_shape(OP, "k", k, (B, T, S, k.shape[3], D), "(B, T, S, G, D)")
    G = k.shape[3]
    check.check_groups(OP, "k", G, H)
    check.check_start(OP, "frame_start", frame_start)
    norm = check.check_norm(OP, norm, q, H, G, D)
    rope = check.check_rope(OP, rope, q, frame_start + T, S, H, G, D)
    grad = check.wants_grad(q, k, *norm_rope_tensors(norm, rope))
    return QKNormRopeCall(OP, grad, q, k, norm, rope, frame_start)


register(OP, QKNormRopeCall, _prepare)
