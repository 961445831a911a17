"""QK-norm and rotary embedding in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops import check
from vdcore.ops.call import Call, empty_like
from vdcore.ops.operator import by_formula, register, run
from vdcore.ops.qk_norm_rope import cpu, cuda, reference, tangents, triton
from vdcore.rope import Rope


@dataclass
class QKNormRopeCall(Call):
    op: ClassVar[str] = "qk_norm_rope"
    OUTPUTS: ClassVar[int] = 2

    q: Tensor
    k: Tensor
    norm: QKNorm | None
    rope: Rope | None
    frame_start: int

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        return empty_like(self.q), empty_like(self.k)


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
    op = QKNormRopeCall.op
    q = check.unit_stride(check.check_main(op, "q", q, "(B, T, S, H, D)"))
    k = check.unit_stride(check.check_main(op, "k", k, "(B, T, S, G, D)"))
    check.check_like(op, "k", k, q, "q")
    B, T, S, H, D = q.shape
    check.check_shape(op, "k", k, (B, T, S, k.shape[3], D), "(B, T, S, G, D)")
    G = k.shape[3]
    check.check_groups(op, "k", G, H)
    check.check_start(op, "frame_start", frame_start)
    norm = check.check_norm(op, norm, q, H, G, D)
    rope = check.check_rope(op, rope, q, frame_start + T, S, H, G, D)
    q, k = run(QKNormRopeCall(q, k, norm, rope, frame_start), backend)
    return q, k


register(
    qk_norm_rope,
    QKNormRopeCall,
    tangents.qk_norm_rope,
    reference=by_formula(reference.qk_norm_rope),
    cpu=cpu.NORM_ROPE,
    triton=triton.NORM_ROPE,
    cuda=cuda.NORM_ROPE,
)
