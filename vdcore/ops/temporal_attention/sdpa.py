"""torch's own attention as a backend: dense attention over one run of keys, by slicing, never by a mask.

A mask would let NaN from hidden rows through (0 * NaN) and cost work for pairs that nobody sees. So a call qualifies
when its query frames all see the same run of frames; spatial attention does with frames as the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.backends.base import Backend, Gradients, Implementation, recording
from vdcore.backends.call import AttentionCall, CrossCall, FrameCall, TemporalCall
from vdcore.mask import FrameMask, Run


def _shared_run(call: AttentionCall) -> Run | None:
    """The one run of key frames that all query frames see, if there is one."""
    runs = set(call.mask.runs(call.q.shape[1], call.k.shape[1], call.q_start))
    if len(runs) != 1:
        return None
    (only,) = runs
    return only[0] if len(only) == 1 else None


def _is_spatial(call: AttentionCall) -> bool:
    return (
        isinstance(call, FrameCall)
        and call.mask == FrameMask.same_frame()
        and call.q_start == 0
        and call.q.shape[1] == call.k.shape[1]
    )


def _why_not_qkv(q: Tensor, k: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "float64 goes to the reference"
    if q.device.type not in ("cpu", "cuda"):
        return f"it is not set up for {q.device.type}"
    if q.shape[-2] != k.shape[-2]:
        return "torch copies grouped keys and values for every query head"
    return None


def _why_not_attention(call: AttentionCall) -> str | None:
    reason = _why_not_qkv(call.q, call.k) or _why_not_results(call)
    if reason:
        return reason
    if call.lengths is not None:
        return "lengths would need a mask"
    if isinstance(call, FrameCall):
        if call.text is not None:
            return "text would have to be concatenated to the video's keys"
        if _is_spatial(call):
            return None
    if _shared_run(call) is None:
        return "its frames do not all see the same run of frames, which would need a mask"
    return None


def _why_not_cross(call: CrossCall) -> str | None:
    reason = _why_not_qkv(call.q, call.k) or _why_not_results(call)
    if reason:
        return reason
    if call.lengths is not None:
        return "lengths would need a mask"
    return None


def _why_not_results(call: AttentionCall | CrossCall) -> str | None:
    if call.q.device.type == "cuda" and call.lse:
        return "on CUDA torch's fused backward is not deterministic, and its forward does not hand out lse"
    if call.return_lse and call.q.dtype != torch.float32:
        return f"torch's lse of {call.q.dtype} inputs errs many times as much as the tolerance rule allows"
    return None


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


# ---- A call as dense problems: views of its tensors, and the way back ----


def _split(call: AttentionCall | CrossCall, x: Tensor, *, keys: bool = False) -> list[Tensor]:
    """Views ``(N, heads, n, D)`` of a tensor of the shape of q, or of k and v."""
    if isinstance(call, TemporalCall):  # one problem a sample: batch and positions do not merge into a view
        return [one.permute(1, 2, 0, 3) for one in x]
    if isinstance(call, CrossCall) and keys and x.ndim == 4:
        return [x.transpose(1, 2)]
    frames_apart = x.ndim == 5 and (call.k.ndim == 5 if isinstance(call, CrossCall) else _is_spatial(call))
    return [x.flatten(0, 1).transpose(1, 2) if frames_apart else x.flatten(1, 2).transpose(1, 2)]


def _join(call: AttentionCall | CrossCall, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """The reverse: the contiguous tensor of this shape."""
    if isinstance(call, TemporalCall):
        whole = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
        for one, part in zip(whole, parts):
            one.copy_(part.permute(2, 0, 1, 3))
        return whole
    return parts[0].transpose(1, 2).reshape(shape).contiguous()


def _key_frames(call: AttentionCall, x: Tensor) -> Tensor:
    if _is_spatial(call):
        return x
    run = _shared_run(call)
    assert run is not None
    return x[:, run[0] : run[1]]


def _inputs(call: AttentionCall | CrossCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the scores see them, in q's dtype."""
    q, k, v = call.q, call.k, call.v
    rope = None
    if isinstance(call, AttentionCall):
        k, v, rope = _key_frames(call, k), _key_frames(call, v), call.rope
    dtype = q.dtype
    if call.norm is not None:
        q, k = call.norm.q(q), call.norm.k(k)
    if rope is not None and isinstance(call, AttentionCall):
        first = 0 if _is_spatial(call) else (_shared_run(call) or (0, 0))[0]
        q, k = rope.rotate(q, call.q_start), rope.rotate(k, first)
    return q.to(dtype), k.to(dtype), v


def _forward(call: AttentionCall | CrossCall) -> tuple[Tensor, ...]:
    with torch.no_grad():
        q, k, v = _inputs(call)
    triples = zip(_split(call, q), _split(call, k, keys=True), _split(call, v, keys=True))
    parts = [_forward_one(*triple, call.scale) for triple in triples]
    out, lse = call.empty_outputs()
    out = _join(call, [o for o, _ in parts], q.shape).view(out.shape)
    if call.lse:
        rows = [x[..., None] for _, x in parts if x is not None]
        lse = _join(call, rows, torch.Size((*q.shape[:-1], 1))).view(lse.shape)
    return out, lse


def _backward(
    call: AttentionCall | CrossCall,
    outputs: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    wanted: frozenset[str],
) -> Gradients:
    names = [name.rstrip("?") for name in call.TENSORS]
    leaves = [
        x.detach().requires_grad_() if x is not None and name in wanted else x for name, x in zip(names, call.tensors())
    ]
    inputs = {name: x for name, x in zip(names, leaves) if name in wanted and x is not None}
    with recording():
        q, k, v = _inputs(call.build(call.op, call.grad, tuple(leaves), call.attributes()))  # type: ignore[arg-type]
    shape, rows = call.q.shape, call.q.shape[:-1]
    dout, dlse = grads
    with torch.no_grad():
        qs, ks, vs = (_split(call, x.detach(), keys=i > 0) for i, x in enumerate((q, k, v)))
        out = _split(call, outputs[0].view(shape))
        dout = torch.zeros_like(outputs[0]) if dout is None else dout
        douts = _split(call, dout.reshape(shape))
        lse = [x[..., 0].contiguous() for x in _split(call, outputs[1].view(rows)[..., None])]
        dlses: list[Tensor] | list[None] = [None] * len(lse)
        if dlse is not None:
            dlses = [x[..., 0] for x in _split(call, dlse.reshape(rows)[..., None])]
        parts = [
            _backward_one(qs[i], ks[i], vs[i], out[i], lse[i], douts[i], dlses[i], call.scale) for i in range(len(qs))
        ]
        whole = [_join(call, [part[i] for part in parts], x.shape) for i, x in enumerate((q, k, v))]
    pairs = [(x, dx) for x, dx in zip((q, k, v), whole) if x.requires_grad]
    with recording():
        found = torch.autograd.grad(
            [x for x, _ in pairs], list(inputs.values()), [dx for _, dx in pairs], allow_unused=True
        )
    return {
        name: torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx.contiguous()
        for (name, x), dx in zip(inputs.items(), found)
    }


_attention = Implementation(_forward, _backward, _why_not_attention)

BACKEND = Backend(
    name="sdpa",
    missing=lambda: None,
    operators={
        "spatial_attention": _attention,
        "video_attention": _attention,
        "temporal_attention": _attention,
        "cross_attention": Implementation(_forward, _backward, _why_not_cross),
    },
)
