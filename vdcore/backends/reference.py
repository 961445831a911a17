"""The oracles as a backend: exact for every call, in any float dtype, on any device. Slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdcore import reference
from vdcore.backends.base import Backend, Gradients, Implementation, recording
from vdcore.backends.call import (
    Call,
    CrossCall,
    FrameCall,
    GatedCall,
    GateResidualCall,
    ModulateCall,
    PatchifyCall,
    QKNormRopeCall,
    TemporalCall,
    UnpatchifyCall,
)


def _temporal(c: TemporalCall) -> tuple[Tensor, ...]:
    return reference.temporal_attention(
        c.q,
        c.k,
        c.v,
        mask=c.mask,
        q_start=c.q_start,
        lengths=c.lengths,
        scale=c.scale,
        norm=c.norm,
        rope=c.rope,
    )


def _video(c: FrameCall) -> tuple[Tensor, ...]:
    return reference.video_attention(
        c.q,
        c.k,
        c.v,
        mask=c.mask,
        q_start=c.q_start,
        lengths=c.lengths,
        text=c.text,
        text_lengths=c.text_lengths,
        text_norm=c.text_norm,
        text_first=c.text_first,
        text_sees=c.text_sees,
        scale=c.scale,
        norm=c.norm,
        rope=c.rope,
    )


def _gated(c: GatedCall) -> tuple[Tensor, ...]:
    return reference.gated_attention(
        c.spatial,
        c.temporal,
        c.gate,
        mask=c.mask,
        lengths=c.lengths,
        scale=c.scale,
        norm=c.norm,
        rope=c.rope,
    )


def _cross(c: CrossCall) -> tuple[Tensor, ...]:
    return reference.cross_attention(c.q, c.k, c.v, lengths=c.lengths, scale=c.scale, norm=c.norm)


def _qk_norm_rope(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    return reference.qk_norm_rope(c.q, c.k, norm=c.norm, rope=c.rope, frame_start=c.frame_start)


def _patchify(c: PatchifyCall) -> tuple[Tensor, ...]:
    return (reference.patchify(c.video, c.weight, c.bias),)


def _unpatchify(c: UnpatchifyCall) -> tuple[Tensor, ...]:
    out = reference.unpatchify(
        c.tokens, c.weight, c.bias, channels=c.channels, patch=c.patch, grid=c.grid, order=c.order
    )
    return (out,)


def _modulate(c: ModulateCall) -> tuple[Tensor, ...]:
    return (reference.modulate(c.x, c.shift, c.scale, kind=c.kind, weight=c.weight, bias=c.bias, eps=c.eps),)


def _gate_residual(c: GateResidualCall) -> tuple[Tensor, ...]:
    return (reference.gate_residual(c.residual, c.x, c.gate),)


def _implementation(formula: Callable[[Any], tuple[Tensor, ...]]) -> Implementation:
    def forward(call: Call) -> tuple[Tensor, ...]:
        with torch.no_grad():
            results = formula(call)
        # What the formula does not return (or nobody wants) stays empty.
        outputs = call.empty_outputs()
        return tuple(
            results[i].to(out.dtype).contiguous() if i < len(results) and out.shape == results[i].shape else out
            for i, out in enumerate(outputs)
        )

    def backward(
        call: Call, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
    ) -> Gradients:
        names = [name.rstrip("?") for name in call.TENSORS]
        leaves = [
            x.detach().requires_grad_() if x is not None and name in wanted else x
            for name, x in zip(names, call.tensors())
        ]
        with recording():
            results = formula(call.build(call.op, call.grad, tuple(leaves), call.attributes()))
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(results, grads) if dy is not None and y.requires_grad]
        inputs = {name: x for name, x in zip(names, leaves) if name in wanted and x is not None}
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if pairs:
            with recording():
                found = torch.autograd.grad(
                    [y for y, _ in pairs], list(inputs.values()), [dy for _, dy in pairs], allow_unused=True
                )
        return {
            name: torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx.contiguous()
            for (name, x), dx in zip(inputs.items(), found)
        }

    return Implementation(forward, backward)


BACKEND = Backend(
    name="reference",
    missing=lambda: None,
    operators={
        "spatial_attention": _implementation(_video),
        "video_attention": _implementation(_video),
        "temporal_attention": _implementation(_temporal),
        "gated_attention": _implementation(_gated),
        "cross_attention": _implementation(_cross),
        "qk_norm_rope": _implementation(_qk_norm_rope),
        "patchify": _implementation(_patchify),
        "unpatchify": _implementation(_unpatchify),
        "modulate": _implementation(_modulate),
        "gate_residual": _implementation(_gate_residual),
    },
)
