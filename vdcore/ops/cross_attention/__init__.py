"""Attention of video tokens to text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict, overload

from torch import Tensor

from vdcore.norm import QKNorm
from vdcore.ops import check
from vdcore.ops.call import Call, empty, empty_like, lse_dtype
from vdcore.ops.cross_attention import cpu, cpu_tangents, reference, sdpa, tangents, triton
from vdcore.ops.operator import by_formula, register, run

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class CrossCall(Call):
    """q ``(B, T, S, H, D)``, k and v ``(B, L, G, D)`` or ``(B, T, L, G, D)``, lengths ``(B,)`` or ``(B, T)``."""

    op: ClassVar[str] = "cross_attention"
    OUTPUTS: ClassVar[int] = 2
    SAVES_OUTPUTS: ClassVar[bool] = True

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    scale: float
    norm: QKNorm | None
    return_lse: bool

    @property
    def is_dense(self) -> bool:
        return self.lengths is None and self.norm is None

    @property
    def is_empty(self) -> bool:
        return self.q.numel() == 0 or self.k.numel() == 0

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
        lse = empty(self.q, self.q.shape[:-1], lse_dtype(self.q)) if self.return_lse or self.grad else None
        return empty_like(self.q), lse


class _More(TypedDict, total=False):
    lengths: Tensor | None
    scale: float | None
    norm: QKNorm | None
    backend: str | None


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **kw: Unpack[_More]
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **kw: Unpack[_More]
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **kw: Unpack[_More]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    op = CrossCall.op
    q, k, v = check.autocast(*(check.check_tensor(op, name, x) for name, x in zip("qkv", (q, k, v))))
    q = check.unit_stride(check.check_main(op, "q", q, "(B, T, S, H, D)"))
    B, T, _, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        check.check_like(op, name, x, q, "q")
        if x.ndim not in (4, 5):
            check.wrong(op, name, "(B, L, G, D) or (B, T, L, G, D)", check.shape_of(x))
    lead, dims = ((B,), "(B, L, G, D)") if k.ndim == 4 else ((B, T), "(B, T, L, G, D)")
    check.check_shape(op, "k", k, (*lead, *k.shape[-3:-1], D), dims)
    check.check_shape(op, "v", v, tuple(k.shape), "the shape of k")
    G = k.shape[-2]
    check.check_groups(op, "k", G, H)
    k, v = check.unit_stride(k), check.unit_stride(v)
    norm = check.check_norm(op, norm, q, H, G, D)
    lengths = check.check_lengths(op, "lengths", lengths, [(B,), (B, T)], "(B,) or (B, T)", q)
    call = CrossCall(q, k, v, lengths, check.check_scale(op, scale, D), norm, bool(return_lse))
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


register(
    cross_attention,
    CrossCall,
    tangents.cross_attention,
    reference=by_formula(reference.cross_attention),
    cpu=replace(cpu.CROSS, tangents=cpu_tangents.cross_attention),
    triton=triton.CROSS,
    sdpa=sdpa.CROSS,
)
