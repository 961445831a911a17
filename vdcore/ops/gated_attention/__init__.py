"""Spatial and temporal attention side by side, mixed by a gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.call import QKV, GatedCall
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import _check as check
from vdcore.ops._operator import register, run
from vdcore.ops.temporal_attention import norm_rope_tensors
from vdcore.rope import Rope

OP = "gated_attention"


def gated_attention(
    spatial: QKV,
    temporal: QKV,
    gate: Tensor,
    *,
    mask: FrameMask = FrameMask(),
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: tuple[QKNorm | None, QKNorm | None] = (None, None),
    rope: tuple[Rope | None, Rope | None] = (None, None),
    backend: str | None = None,
) -> Tensor:
    """``gate * spatial_attention(*spatial) + (1 - gate) * temporal_attention(*temporal, mask)``, in one operator.

    Args:
        spatial, temporal: ``(q, k, v)``, each ``(B, T, S, heads, D)``; they may be the same tensors.
        gate: broadcasts to ``(B, T, S, H, D)``: a scalar, per head, per channel, per token. Its gradient is summed in
            float32, in a fixed order, and has its shape and dtype.
        mask: of the temporal part.
        lengths: ``(B,)``, valid frames of each sample, for both parts; below 0 counts as 0, above T as T.
        scale: of the scores of both; None: ``D ** -0.5``.
        norm, rope: (spatial, temporal) pairs.
        backend: run on this one or raise.

    Returns:
        ``(B, T, S, H, D)`` in q's dtype, contiguous.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    call = _prepare(spatial, temporal, gate, mask=mask, lengths=lengths, scale=scale, norm=norm, rope=rope)
    return run(call, backend)[0]


def _prepare(
    spatial: Any,
    temporal: Any,
    gate: Any,
    *,
    mask: Any = FrameMask(),
    lengths: Any = None,
    scale: Any = None,
    norm: Any = (None, None),
    rope: Any = (None, None),
) -> GatedCall:
    triples = []
    for name, triple in (("spatial", spatial), ("temporal", temporal)):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3:
            raise TypeError(f"{OP}: {name} must be a tuple (q, k, v), got {type(triple).__name__}")
        cast = check.autocast(*(check.check_tensor(OP, f"{name}.{x}", y) for x, y in zip("qkv", triple)))
        triples.append(check.check_qkv(OP, *cast, prefix=f"{name}.")[:3])
    q = triples[0][0]
    B, T, S, H, D = q.shape
    check.check_like(OP, "temporal.q", triples[1][0], q, "spatial.q")
    check.check_shape(OP, "temporal.q", triples[1][0], q.shape, "the shape of spatial.q")
    for name, (_, k, _) in zip(("spatial", "temporal"), triples):
        check.check_shape(OP, f"{name}.k", k, (B, T, S, k.shape[3], D), "(B, T, S, G, D)")
    check.check_like(OP, "gate", gate, q, "spatial.q", or_float32=True)
    if gate.ndim > 5 or any(n not in (1, m) for n, m in zip(reversed(gate.shape), reversed(q.shape))):
        check.wrong(OP, "gate", f"broadcastable to (B, T, S, H, D) = {tuple(q.shape)}", check.shape_of(gate))
    if not isinstance(mask, FrameMask):
        raise TypeError(f"{OP}: mask must be a FrameMask, got {type(mask).__name__}")
    for name, pair in (("norm", norm), ("rope", rope)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{OP}: {name} must be a pair (spatial, temporal), got {type(pair).__name__}")
    heads = [k.shape[3] for _, k, _ in triples]
    norms = tuple(check.check_norm(OP, x, q, H, G, D, name=f"norm[{i}]") for i, (x, G) in enumerate(zip(norm, heads)))
    ropes = tuple(
        check.check_rope(OP, x, q, T, S, H, G, D, name=f"rope[{i}]") for i, (x, G) in enumerate(zip(rope, heads))
    )
    extras = [x for pair in zip(norms, ropes) for x in norm_rope_tensors(*pair)]
    return GatedCall(
        op=OP,
        grad=check.wants_grad(*triples[0], *triples[1], gate, *extras),
        spatial=triples[0],
        temporal=triples[1],
        gate=gate,
        mask=mask,
        lengths=check.check_lengths(OP, "lengths", lengths, [(B,)], "(B,)", q),
        scale=check.check_scale(OP, scale, D),
        norm=norms,  # type: ignore[arg-type]
        rope=ropes,  # type: ignore[arg-type]
    )


register(OP, GatedCall, _prepare)
