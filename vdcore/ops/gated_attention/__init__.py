"""Spatial and temporal attention side by side, mixed by a gate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import check
from vdcore.ops.call import QKV, Call, Triple, empty, empty_like, lse_dtype
from vdcore.ops.frame_attention import SpatialCall
from vdcore.ops.gated_attention import cpu, cpu_tangents, cuda, reference, tangents, triton
from vdcore.ops.operator import by_formula, register, run
from vdcore.ops.temporal_attention import TemporalCall
from vdcore.rope import Rope


@dataclass
class GatedCall(Call):
    """Forward also returns the spatial result and both lse, None without gradients."""

    op: ClassVar[str] = "gated_attention"
    OUTPUTS: ClassVar[int] = 4
    SAVES_OUTPUTS: ClassVar[bool] = True

    spatial: Triple
    temporal: Triple
    gate: Tensor
    mask: FrameMask
    lengths: Tensor | None
    scale: float
    spatial_norm: QKNorm | None
    temporal_norm: QKNorm | None
    spatial_rope: Rope | None
    temporal_rope: Rope | None

    def parts(self) -> tuple[SpatialCall, TemporalCall]:
        """The two attentions that the gate mixes."""
        shared: Any = {"q_start": 0, "lengths": self.lengths, "scale": self.scale, "return_lse": False}
        spatial = SpatialCall(
            QKV(*self.spatial),
            mask=FrameMask.same_frame(),
            norm=self.spatial_norm,
            rope=self.spatial_rope,
            **shared,
        )
        temporal = TemporalCall(
            QKV(*self.temporal), mask=self.mask, norm=self.temporal_norm, rope=self.temporal_rope, **shared
        )
        spatial.grad = temporal.grad = self.grad
        return spatial, temporal

    def empty_outputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        q = self.main
        if not self.grad:
            return empty_like(q), None, None, None
        lse, temporal_lse = (empty(q, q.shape[:-1], lse_dtype(q)) for _ in range(2))
        return empty_like(q), empty_like(q), lse, temporal_lse


def gated_attention(
    spatial: Triple,
    temporal: Triple,
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
    op = GatedCall.op
    triples: list[Any] = []
    for name, triple in (("spatial", spatial), ("temporal", temporal)):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3:
            raise TypeError(f"{op}: {name} must be a tuple (q, k, v), got {type(triple).__name__}")
        cast = check.autocast(*(check.check_tensor(op, f"{name}.{x}", y) for x, y in zip("qkv", triple)))
        triples.append(check.check_qkv(op, *cast, prefix=f"{name}.").views)  # never packed
    q = triples[0][0]
    B, T, S, H, D = q.shape
    check.check_like(op, "temporal.q", triples[1][0], q, "spatial.q")
    check.check_shape(op, "temporal.q", triples[1][0], q.shape, "the shape of spatial.q")
    for name, (_, k, _) in zip(("spatial", "temporal"), triples):
        check.check_shape(op, f"{name}.k", k, (B, T, S, k.shape[3], D), "(B, T, S, G, D)")
    check.check_like(op, "gate", gate, q, "spatial.q", or_float32=True)
    if gate.ndim > 5 or any(n not in (1, m) for n, m in zip(reversed(gate.shape), reversed(q.shape))):
        check.wrong(op, "gate", f"broadcastable to (B, T, S, H, D) = {tuple(q.shape)}", check.shape_of(gate))
    check.check_mask_type(op, mask)
    for name, pair in (("norm", norm), ("rope", rope)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{op}: {name} must be a pair (spatial, temporal), got {type(pair).__name__}")
    heads = [k.shape[3] for _, k, _ in triples]
    norms = [check.check_norm(op, x, q, H, G, D, name=f"norm[{i}]") for i, (x, G) in enumerate(zip(norm, heads))]
    ropes = [check.check_rope(op, x, q, T, S, H, G, D, name=f"rope[{i}]") for i, (x, G) in enumerate(zip(rope, heads))]
    lengths = check.check_lengths(op, "lengths", lengths, [(B,)], "(B,)", q)
    call = GatedCall(
        spatial=triples[0],
        temporal=triples[1],
        gate=gate,
        mask=mask,
        lengths=lengths,
        scale=check.check_scale(op, scale, D),
        spatial_norm=norms[0],
        temporal_norm=norms[1],
        spatial_rope=ropes[0],
        temporal_rope=ropes[1],
    )
    return run(call, backend)[0]


register(
    gated_attention,
    GatedCall,
    tangents.gated_attention,
    reference=by_formula(reference.gated_attention),
    cpu=replace(cpu.GATED, tangents=cpu_tangents.gated_attention),
    triton=triton.GATED,
    cuda=cuda.GATED,
)
