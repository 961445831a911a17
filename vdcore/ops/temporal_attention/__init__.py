"""Attention across frames at one position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict, overload

from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import check
from vdcore.ops.call import AttentionCall, empty, empty_like, lse_dtype
from vdcore.ops.operator import by_formula, register, run
from vdcore.ops.temporal_attention import cpu, cpu_tangents, cuda, reference, sdpa, tangents, triton
from vdcore.rope import Rope

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class TemporalCall(AttentionCall):
    op: ClassVar[str] = "temporal_attention"

    bias: Tensor | None = None

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """out ``(B, T, S, H, D)`` and lse ``(B, T, S, H)``."""
        q = self.qkv.main if self.qkv.packed is None else self.qkv.main.select(3, 0)
        lse = empty(q, q.shape[:-1], lse_dtype(q)) if self.return_lse or self.grad else None
        return empty_like(q), lse


class _More(TypedDict, total=False):
    mask: FrameMask
    q_start: int | None
    lengths: Tensor | None
    scale: float | None
    norm: QKNorm | None
    rope: Rope | None
    bias: Tensor | None
    backend: str | None


@overload
def temporal_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[False] = ..., **kw: Unpack[_More]
) -> Tensor: ...
@overload
def temporal_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[True], **kw: Unpack[_More]
) -> tuple[Tensor, Tensor]: ...
@overload
def temporal_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: bool, **kw: Unpack[_More]
) -> Tensor | tuple[Tensor, Tensor]: ...
def temporal_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every token attends to the same position in the frames that its frame sees.

    ``out[b, t, s] = softmax(scale * q[b, t, s] . k[b, f, s] + bias[t, f] for visible f) v[b, f, s]``, per head. Reads
    q, k and v through their strides; nothing is permuted or padded.

    Args:
        q: ``(B, T, S, H, D)``, or packed ``(B, T, S, 3, H, D)`` with k and v None: then its gradient is one packed
            tensor.
        k, v: ``(B, T_k, S, G, D)``; G divides H, and each key/value head serves H/G query heads.
        mask: which frames a frame sees. Of a frame that sees a value which is not finite, the whole row may become NaN.
        q_start: index, among the key frames, of the first query frame; None: ``max(T_k - T, 0)``.
        lengths: ``(B,)``, valid frames of each sample. Key frames past it are invisible; query frames whose index
            ``q_start + t`` is past it give 0. A length below 0 counts as 0, one above the number of frames,
            ``max(T_k, q_start + T)``, as that number.
        scale: of the scores; None: ``D ** -0.5``.
        norm: applied to q and k, before rope.
        rope: key frame ``t`` uses row ``t``, query frame ``t`` row ``q_start + t``.
        bias: ``(H or 1, T, T_k)`` in q's dtype or float32, added to the scaled scores before the mask; relative
            positions, for example. What it holds for pairs that are not visible is not read.
        return_lse: also return the log-sum-exp of the scores, float32 ``(B, T, S, H)``, -inf where a row sees
            nothing; differentiable.
        backend: run on this one or raise.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous. A row that sees nothing is 0.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    arguments = check.check_attention(TemporalCall.op, q, k, v, mask, q_start, lengths, scale, norm, rope)
    if bias is not None:
        check.check_bias(TemporalCall.op, bias, arguments[0])
    out, lse = run(TemporalCall(*arguments, bool(return_lse), bias), backend)
    return (out, lse) if return_lse else out


register(
    temporal_attention,
    TemporalCall,
    tangents.temporal_attention,
    reference=by_formula(reference.temporal_attention),
    cpu=replace(cpu.TEMPORAL, tangents=cpu_tangents.temporal_attention),
    triton=triton.TEMPORAL,
    cuda=cuda.TEMPORAL,
    sdpa=sdpa.TEMPORAL,
)
