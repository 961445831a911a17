"""Attention across frames at one position."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import TemporalCall
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run
from vdcore.rope import Rope

OP = "temporal_attention"


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
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every token attends to the same position in the frames that its frame sees.

    ``out[b, t, s] = softmax(scale * q[b, t, s] . k[b, f, s] for visible f) v[b, f, s]``, per head. Reads q, k and v
    through their strides; nothing is permuted or padded.

    Args:
        q: ``(B, T, S, H, D)``, or packed ``(B, T, S, 3, H, D)`` with k and v None: then its gradient is one packed
            tensor.
        k, v: ``(B, T_k, S, G, D)``; G divides H, and each key/value head serves H/G query heads.
        mask: which frames a frame sees.
        q_start: index, among the key frames, of the first query frame; None: ``max(T_k - T, 0)``.
        lengths: ``(B,)``, valid frames of each sample. Key frames past it are invisible; query frames whose index
            ``q_start + t`` is past it give 0. A length below 0 counts as 0, one above the number of frames,
            ``max(T_k, q_start + T)``, as that number.
        scale: of the scores; None: ``D ** -0.5``.
        norm: applied to q and k, before rope.
        rope: key frame ``t`` uses row ``t``, query frame ``t`` row ``q_start + t``.
        return_lse: also return the log-sum-exp of the scaled scores, float32 ``(B, T, S, H)``, -inf where a row sees
            nothing; differentiable.
        backend: run on this one or raise.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous. A row that sees nothing is 0.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    call = _prepare(
        q, k, v, mask=mask, q_start=q_start, lengths=lengths, scale=scale, norm=norm, rope=rope, return_lse=return_lse
    )
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def prepare_attention(
    op: str, q: Any, k: Any, v: Any, mask: Any, q_start: Any, lengths: Any, scale: Any, norm: Any, rope: Any
) -> dict[str, Any]:
    """The checked arguments that temporal and video attention share."""
    q, k, v = check.autocast(check.check_tensor(op, "q", q), k, v)
    q, k, v, packed = check.check_qkv(op, q, k, v)
    _, T, S, H, D = q.shape
    T_k, G = k.shape[1], k.shape[3]
    if not isinstance(mask, FrameMask):
        raise TypeError(f"{op}: mask must be a FrameMask, got {type(mask).__name__}")
    if q_start is None:
        q_start = max(T_k - T, 0)
    check.check_start(op, "q_start", q_start)
    return {
        "q": q,
        "k": k,
        "v": v,
        "packed": packed,
        "mask": mask,
        "q_start": q_start,
        "lengths": check.check_lengths(op, "lengths", lengths, [(q.shape[0],)], "(B,)", q),
        "scale": check.check_scale(op, scale, D),
        "norm": check.check_norm(op, norm, q, H, G, D),
        "rope": check.check_rope(op, rope, q, max(T_k, q_start + T), S, H, G, D),
    }


def norm_rope_tensors(norm: QKNorm | None, rope: Rope | None) -> tuple[Tensor | None, ...]:
    """Every tensor in them that may want a gradient."""
    tensors: tuple[Tensor | None, ...] = ()
    if norm is not None:
        tensors += (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
    if rope is not None:
        tensors += (rope.cos, rope.sin)
    return tensors


def _prepare(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    mask: Any = FrameMask(),
    q_start: Any = None,
    lengths: Any = None,
    scale: Any = None,
    norm: Any = None,
    rope: Any = None,
    return_lse: bool = False,
) -> TemporalCall:
    args = prepare_attention(OP, q, k, v, mask, q_start, lengths, scale, norm, rope)
    grad = check.wants_grad(args["q"], args["k"], args["v"], *norm_rope_tensors(args["norm"], args["rope"]))
    return TemporalCall(op=OP, grad=grad, return_lse=bool(return_lse), **args)


register(OP, TemporalCall, _prepare)
