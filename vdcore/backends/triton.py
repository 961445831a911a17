"""The Triton kernels as a backend: on a GPU, or on CPU tensors under Triton's interpreter.

The kernels are imported at the first call: ``import vdcore`` imports no triton.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from vdcore.backends.base import Backend, Gradients, Implementation
from vdcore.backends.call import (
    AttentionCall,
    Call,
    FrameCall,
    GateResidualCall,
    ModulateCall,
    QKNormRopeCall,
    TemporalCall,
)
from vdcore.norm import QKNorm
from vdcore.rope import Rope

# Versions of Triton whose results are wrong, with the kernel and the configuration that shows it.
VERSION_DENYLIST: dict[str, str] = {}

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = ""
    if installed in VERSION_DENYLIST:
        return f"triton {installed} gives wrong results: {VERSION_DENYLIST[installed]}"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU is visible to torch (with TRITON_INTERPRET=1 the kernels run on the CPU, interpreted)"
    return None


@cache
def interpreted() -> bool:
    """Triton decides this once, when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _why_not(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it has no {x.dtype}"
    if x.device.type == "cuda":
        return None
    if x.device.type == "cpu" and interpreted():
        return "Triton's interpreter multiplies bfloat16 matrices wrongly" if x.dtype == torch.bfloat16 else None
    return f"it runs on a GPU, and the tensors are on {x.device}"


def _unit(x: Tensor) -> Tensor:
    """An incoming gradient with innermost stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# ---- Adaptive norm ----


def _adaln_why_not(c: Call) -> str | None:
    from vdcore.kernels.adaln import MAX_CHANNELS

    if c.main.shape[-1] > MAX_CHANNELS:
        return f"it has at most {MAX_CHANNELS} channels, got {c.main.shape[-1]}"
    return _why_not(c.main)


def _modulate(c: ModulateCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.adaln import modulate_forward

    return (modulate_forward(c.x, c.shift, c.scale, c.weight, c.bias, c.kind, c.eps),)


def _modulate_backward(c: ModulateCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: Any) -> Gradients:
    from vdcore.kernels.adaln import modulate_backward

    dy = _unit(grads[0]) if grads[0] is not None else torch.zeros_like(c.x)
    return modulate_backward(c.x, c.shift, c.scale, c.weight, c.bias, c.kind, c.eps, dy, wanted)


def _gate_residual(c: GateResidualCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.adaln import gate_residual_forward

    return (gate_residual_forward(c.residual, c.x, c.gate),)


def _gate_residual_backward(
    c: GateResidualCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: Any
) -> Gradients:
    from vdcore.kernels.adaln import gate_residual_backward

    dy = _unit(grads[0]) if grads[0] is not None else torch.zeros_like(c.x)
    return gate_residual_backward(c.x, c.gate, dy, wanted)


# ---- Norm and rope alone ----


def _qk_norm_rope_why_not(c: QKNormRopeCall) -> str | None:
    return _why_not(c.q) or _why_not_norm(c.q, c.k, c.norm)


def _why_not_norm(q: Tensor, k: Tensor, norm: QKNorm | None) -> str | None:
    from vdcore.kernels.qk_norm_rope import MAX_TOKEN, fits

    if all(fits(x.shape[-2], x.shape[-1], norm) for x in (q, k)):
        return None
    return f"a norm over all heads holds at most {MAX_TOKEN} channels of a token"


def _qk_norm_rope(c: QKNormRopeCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.qk_norm_rope import norm_rope_forward

    return tuple(norm_rope_forward(x, c.norm, role, c.rope, c.frame_start) for role, x in (("q", c.q), ("k", c.k)))


def _qk_norm_rope_backward(
    c: QKNormRopeCall, outputs: Any, grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    found: Gradients = {}
    for role, x, dy in (("q", c.q, grads[0]), ("k", c.k, grads[1])):
        _norm_rope_gradients(found, x, dy, c.norm, role, c.rope, c.frame_start, wanted)
    return found


def _norm_rope_gradients(
    found: Gradients,
    x: Tensor,
    dy: Tensor | None,
    norm: QKNorm | None,
    role: str,
    rope: Rope | None,
    start: int,
    wanted: frozenset[str],
    *,
    prefix: str = "",
    keep: bool = True,
    **where: Any,
) -> None:
    """Adds what the norm and rope of q or k give their tensors, under the names of the call; x's too with ``keep``."""
    from vdcore.kernels.qk_norm_rope import norm_rope_backward

    names = {"weight": f"{prefix}{role}_weight", "bias": f"{prefix}{role}_bias"}
    names |= {"cos": f"{prefix}cos", "sin": f"{prefix}sin"}
    inner = frozenset(short for short, name in names.items() if name in wanted)
    dy = _unit(dy) if dy is not None else torch.zeros_like(x, memory_format=torch.contiguous_format)
    for short, dx in norm_rope_backward(x, dy, norm, role, rope, start, inner, **where).items():
        name = names.get(short, prefix + role)
        if short == "x" and not keep:
            continue
        found[name] = found[name] + dx if short in ("cos", "sin") and name in found else dx


# ---- Temporal attention ----


def _temporal_why_not(c: TemporalCall) -> str | None:
    return _why_not(c.q) or _why_not_head(c.q) or _why_not_norm(c.q, c.k, c.norm)


def _why_not_head(q: Tensor) -> str | None:
    return None if q.shape[-1] <= MAX_HEAD_DIM else f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"


def _temporal(c: TemporalCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.temporal_attention import temporal_forward

    out, lse = c.empty_outputs()
    temporal_forward(c.q, c.k, c.v, out, lse if c.lse else None, norm=c.norm, rope=c.rope, scale=c.scale, **_frames(c))
    return out, lse


def _frames(c: AttentionCall) -> dict[str, Any]:
    return {"mask": c.mask, "q_start": c.q_start, "lengths": c.lengths}


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _qkv_gradients(c: AttentionCall) -> tuple[Gradients, tuple[Tensor, Tensor, Tensor]]:
    """Room for the gradients by name, and for those of q, k and v: slices of one tensor where the call is packed."""
    if c.packed is not None:
        packed = _empty_like(c.packed)
        return {"q": packed}, packed.unbind(3)  # type: ignore[return-value]
    found = {"q": _empty_like(c.q), "k": _empty_like(c.k), "v": _empty_like(c.v)}
    return found, tuple(found.values())  # type: ignore[return-value]


def _temporal_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore.kernels.temporal_attention import temporal_backward

    out, lse = outputs
    dout = torch.zeros_like(out) if grads[0] is None else _unit(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    found, gradients = _qkv_gradients(c)
    more = temporal_backward(
        *(c.q, c.k, c.v, out, lse, dout, dlse, gradients, wanted),
        **{"norm": c.norm, "rope": c.rope, "scale": c.scale, **_frames(c)},
    )
    return {**found, **more}


# ---- Spatial, video and cross attention ----


def _frame_why_not(c: FrameCall) -> str | None:
    norms = _why_not_norm(c.q, c.k, c.norm) or (c.text and _why_not_norm(c.text[0], c.text[1], c.text_norm)) or None
    return _why_not(c.q) or _why_not_head(c.q) or _why_not_tokens(c.q, c.k) or norms


def _why_not_tokens(*tensors: Tensor) -> str | None:
    if all(x.shape[1] * x.shape[2] < 2**31 - 2**16 for x in tensors):
        return None
    return "it counts the tokens of a sample in 32 bits"


def _seen(x: Tensor, norm: QKNorm | None, role: str, rope: Rope | None, start: int = 0) -> Tensor:
    """Queries or keys as the scores see them."""
    from vdcore.kernels.qk_norm_rope import norm_rope_forward

    return x if norm is None and rope is None else norm_rope_forward(x, norm, role, rope, start)


def _as_frames(text: Tensor) -> Tensor:
    """Text ``(B, L, heads, D)`` as frames of one token."""
    return text.unsqueeze(2)


def _frame_arguments(c: FrameCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """q, k, v and text as the scores see them, and what else the kernels take."""
    from vdcore.kernels.frame_attention import Lengths

    text = None
    if c.text is not None:
        q, k = (_seen(_as_frames(x), c.text_norm, role, None).squeeze(2) for role, x in zip("qk", c.text))
        text = (q, k, c.text[2])
    seen = (_seen(c.q, c.norm, "q", c.rope, c.q_start), _seen(c.k, c.norm, "k", c.rope), c.v, text)
    return seen, {
        **{"mask": c.mask, "q_start": c.q_start, "lengths": Lengths(c.lengths, None, c.text_lengths)},
        **{"text_first": c.text_first, "text_sees": c.text_sees == "all", "factor": c.scale},
    }


def _frame(c: FrameCall) -> tuple[Tensor, ...]:
    from vdcore.kernels.frame_attention import frame_forward

    out, lse = c.empty_outputs()
    seen, more = _frame_arguments(c)
    frame_forward(*seen, out, lse if c.lse else None, **more)
    return out, lse


def _frame_backward(
    c: FrameCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore.kernels._frames import live_frames
    from vdcore.kernels.frame_attention_backward import frame_backward

    out, lse = outputs
    dout = torch.zeros_like(out) if grads[0] is None else _unit(grads[0])
    dlse = None if grads[1] is None else grads[1].contiguous()
    seen, more = _frame_arguments(c)
    found, gradients = _qkv_gradients(c)
    text_gradients: Any = None
    if c.text is not None:
        text_gradients = tuple(_empty_like(x) for x in c.text)
        found |= dict(zip(("text_q", "text_k", "text_v"), text_gradients))
    # Gradients of what the kernels see; a norm or rope takes those of q and k further.
    filled = [_empty_like(x) if c.norm or c.rope else dx for x, dx in zip((c.q, c.k), gradients)]
    filled_text: Any = text_gradients
    if c.text_norm is not None:
        filled_text = (*(_empty_like(x) for x in text_gradients[:2]), text_gradients[2])
    frame_backward(*seen, out, lse, dout, dlse, (*filled, gradients[2]), filled_text, **more)  # type: ignore[arg-type]
    if c.norm or c.rope:
        text = 0 if c.text is None else c.text[0].shape[1]
        text_args = {"text": text, "text_lengths": c.text_lengths, "text_sees": bool(text) and c.text_sees == "all"}
        live = live_frames(c.q, c.k, mask=c.mask, q_start=c.q_start, lengths=c.lengths, **text_args)
        for i, (role, x, start) in enumerate((("q", c.q, c.q_start), ("k", c.k, 0))):
            where = {"dx": gradients[i], "live": live[i], "keep": c.packed is None}
            _norm_rope_gradients(
                found, x, filled[i], c.norm, role, c.rope, start, wanted, keep=c.packed is None, **where
            )
    if c.text_norm is not None:
        live_text = None
        if c.text_lengths is not None:
            live_text = (torch.arange(c.text[0].shape[1], device=c.q.device) < c.text_lengths[:, None]).to(torch.int8)
        for i, role in enumerate("qk"):
            x, dy, dx = (_as_frames(y) for y in (c.text[i], filled_text[i], text_gradients[i]))
            _norm_rope_gradients(
                found, x, dy, c.text_norm, role, None, 0, wanted, prefix="text_", keep=False, dx=dx, live=live_text
            )
    return found


BACKEND = Backend(
    name="triton",
    missing=missing,
    operators={
        "temporal_attention": Implementation(_temporal, _temporal_backward, _temporal_why_not),
        "spatial_attention": Implementation(_frame, _frame_backward, _frame_why_not),
        "video_attention": Implementation(_frame, _frame_backward, _frame_why_not),
        "qk_norm_rope": Implementation(_qk_norm_rope, _qk_norm_rope_backward, _qk_norm_rope_why_not),
        "modulate": Implementation(_modulate, _modulate_backward, _adaln_why_not),
        "gate_residual": Implementation(_gate_residual, _gate_residual_backward, _adaln_why_not),
    },
)
