"""Gated attention: kernels/gated_attention.py between spatial and temporal attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import GatedCall
from vdcore.backends.triton._common import (
    empty_like,
    norm_rope_gradients,
    seen_by_scores,
    unit,
    why_not,
    why_not_head,
    why_not_norm,
    why_not_tokens,
)
from vdcore.mask import FrameMask


def _why_not(c: GatedCall) -> str | None:
    pairs = zip((c.spatial, c.temporal), c.norm)
    norms = next((reason for (q, k, _), norm in pairs if (reason := why_not_norm(q, k, norm))), None)
    return why_not(c.main) or why_not_head(c.main) or why_not_tokens(c.main) or norms


def _spatial_arguments(c: GatedCall) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    from vdcore.kernels.frame_attention import Lengths

    q, k, v = c.spatial
    seen = (seen_by_scores(q, c.norm[0], "q", c.rope[0]), seen_by_scores(k, c.norm[0], "k", c.rope[0]), v)
    return seen, {
        **{"mask": FrameMask.same_frame(), "q_start": 0, "lengths": Lengths(c.lengths, None, None)},
        **{"text_first": False, "text_sees": False, "factor": c.scale},
    }


def _temporal_arguments(c: GatedCall) -> dict[str, Any]:
    return {
        **{"mask": c.mask, "q_start": 0, "lengths": c.lengths, "scale": c.scale},
        **{"norm": c.norm[1], "rope": c.rope[1]},
    }


def _forward(c: GatedCall) -> tuple[Tensor, ...]:
    from vdcore.kernels._gate import Gate
    from vdcore.kernels.frame_attention import frame_forward
    from vdcore.kernels.temporal_attention import temporal_forward

    out, kept, lse_a, lse_b = c.empty_outputs()
    a = kept if c.grad else out
    seen, more = _spatial_arguments(c)
    frame_forward(*seen, None, a, lse_a if c.grad else None, **more)
    gate = c.gate.expand(out.shape)
    mixed = Gate(gate, a, *gate.stride())
    temporal_forward(*c.temporal, out, lse_b if c.grad else None, gate=mixed, **_temporal_arguments(c))
    return out, kept, lse_a, lse_b


def _backward(
    c: GatedCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore.kernels._frames import live_frames
    from vdcore.kernels.frame_attention_backward import frame_backward
    from vdcore.kernels.gated_attention import gate_backward
    from vdcore.kernels.temporal_attention import temporal_forward
    from vdcore.kernels.temporal_attention_backward import temporal_backward

    _, a, lse_a, lse_b = outputs
    assert grads[0] is not None
    b = empty_like(c.main)
    temporal_forward(*c.temporal, b, None, **_temporal_arguments(c))
    da, db, dgate = gate_backward(unit(grads[0]), a, b, c.gate, c.lengths, "gate" in wanted)
    found: Gradients = {} if dgate is None else {"gate": dgate}

    gradients = tuple(empty_like(x) for x in c.temporal)
    found |= {f"temporal_{name}": dx for name, dx in zip("qkv", gradients)}
    names = frozenset(name.removeprefix("temporal_") for name in wanted if name.startswith("temporal_"))
    more = temporal_backward(*c.temporal, b, lse_b, db, None, gradients, names, **_temporal_arguments(c))
    found |= {f"temporal_{name}": dx for name, dx in more.items()}

    gradients = tuple(empty_like(x) for x in c.spatial)
    found |= dict(zip("qkv", gradients))
    seen, arguments = _spatial_arguments(c)
    frame_backward(*seen, None, a, lse_a, da.flatten(1, 2), None, gradients, None, **arguments)
    if c.norm[0] or c.rope[0]:
        live = live_frames(c.main, c.spatial[1], mask=arguments["mask"], q_start=0, lengths=c.lengths)
        for role, x, dx, alive in zip("qk", c.spatial, gradients, live):
            norm_rope_gradients(found, x, dx, c.norm[0], role, c.rope[0], 0, wanted, live=alive)
    return found


OPERATORS = {"gated_attention": Implementation(_forward, _backward, _why_not)}
