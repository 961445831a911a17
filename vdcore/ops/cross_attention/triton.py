"""Cross attention: frame attention whose key frames are prompts, one for all frames or one per frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.ops.call import empty_like
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.qk_norm_rope.triton import norm_rope_gradients, normalized_rotated
from vdcore.ops.temporal_attention.tangents import prepared
from vdcore.ops.triton import output_gradients, why_not, why_not_head, why_not_norm, why_not_tangents, why_not_tokens

if TYPE_CHECKING:
    from vdcore.ops.cross_attention import CrossCall


def _why_not(c: CrossCall) -> str | None:
    return why_not(c.q) or why_not_head(c.q) or why_not_tokens(c.q) or why_not_norm(c.q, c.k, c.norm)


def _prompts(c: CrossCall) -> tuple[Tensor, Tensor, Tensor | None, FrameMask]:
    """k and v ``(B, 1 or T, L, G, D)``, lengths ``(B, 1 or T)``, and which prompt a frame sees."""
    B, T = c.q.shape[:2]
    k, v = (x if x.ndim == 5 else x.unsqueeze(1) for x in (c.k, c.v))
    lengths = None if c.lengths is None else c.lengths.reshape(B, -1)
    if k.shape[1] != 1 or (lengths is not None and lengths.shape[1] != 1):
        k, v = (x.expand(B, T, *x.shape[2:]) for x in (k, v))
        lengths = None if lengths is None else lengths.expand(B, T)
    mask = FrameMask.full() if k.shape[1] == 1 else FrameMask.same_frame()
    return k, v, None if lengths is None else lengths.contiguous(), mask


def _as_prompts(dx: Tensor, k: Tensor) -> Tensor:
    """A tangent of the call's k or v, as k ``(B, 1 or T, L, G, D)`` is."""
    return (dx if dx.ndim == 5 else dx.unsqueeze(1)).expand(k.shape)


def _problem(c: CrossCall, k: Tensor, v: Tensor, lengths: Tensor | None, mask: FrameMask) -> Any:
    from vdcore_kernels.core.tokens import Lengths
    from vdcore_kernels.frame_attention.problem import FrameProblem

    q, k = normalized_rotated(c.q, c.norm, "q"), normalized_rotated(k, c.norm, "k")
    return FrameProblem(q, k, v, c.scale, lengths=Lengths(None, lengths, None), mask=mask)


def _forward(c: CrossCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.frame_attention.forward import frame_forward

    out, lse = c.empty_outputs()
    frame_forward(_problem(c, *_prompts(c)), out, lse)
    return out, lse


def _backward(
    c: CrossCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.frame_attention.backward import frame_backward

    out, lse = outputs
    dout, dlse = output_gradients(out, grads)
    k, v, lengths, mask = _prompts(c)
    # One prompt that frames see differently much of: its gradients are summed over frames.
    shared = c.k.shape[:-2] != k.shape[:-2] and k.shape[1] > 1
    dq = empty_like(c.q)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32 if shared else k.dtype, device=k.device) for _ in range(2))
    problem = _problem(c, k, v, lengths, mask)
    frame_backward(problem, out, lse, dout.flatten(1, 2), dlse, (dq, dk, dv))
    found: Gradients = {"q": dq, "k": dk, "v": dv}
    if c.norm is not None:
        L = k.shape[2]
        live_q = live_k = None
        if lengths is not None:
            live_q = (lengths > 0).to(torch.int8).expand(c.q.shape[:2])
            live_k = (torch.arange(L, device=k.device) < lengths[..., None]).to(torch.int8)
        norm_rope_gradients(found, c.q, dq, c.norm, "q", None, 0, wanted, live=live_q)
        norm_rope_gradients(found, k, dk, c.norm, "k", None, 0, wanted, live=live_k)
    for name in ("k", "v"):
        dx = found[name]
        found[name] = (dx.sum(1) if shared else dx).reshape(c.k.shape)
    return found


def _tangents(c: CrossCall, outputs: tuple[Tensor, ...], given: Gradients) -> tuple[Tensor, ...]:
    from vdcore_kernels.frame_attention.tangents import NO_TANGENTS, frame_tangents

    problem = _problem(c, *_prompts(c))
    (_, dq), (_, dk) = prepared((c.q, given.get("q")), (c.k, given.get("k")), c.norm, None, 0, given)
    dk, dv = (dx if dx is None else _as_prompts(dx, problem.k) for dx in (dk, given.get("v")))
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    frame_tangents(problem, out, lse, ((dq, dk, dv), NO_TANGENTS), dout, dlse)
    return dout, dlse


def _why_not_tangents(c: CrossCall) -> str | None:
    return why_not_tangents(c.q)


CROSS = Implementation(_forward, _backward, _why_not, tangents=_tangents, why_not_tangents=_why_not_tangents)
