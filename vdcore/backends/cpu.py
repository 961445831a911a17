"""The native CPU engine as a backend: C++ kernels in csrc/cpu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vdcore.backends._native import native, why_no_native
from vdcore.backends.base import Backend, Gradients, Implementation
from vdcore.backends.call import TemporalCall, mask_numbers
from vdcore.norm import QKNorm
from vdcore.rope import Rope

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"rms": 1, "layer": 2}
_STYLES = {"interleaved": 1, "half": 2}

# Sums over positions (gradients of weights and of shared rope tables) are taken in this many parts, whatever the number
# of threads: the same bits on every machine.
_SUM_PARTS = 64


@cache
def missing() -> str | None:
    return why_no_native()


def _why_not(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device != "cpu":
        return f"it runs on the CPU, and the tensors are on {device}"
    if dtype not in _DTYPES:
        return f"it has no {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def _weights(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _capsule(x: Tensor | None) -> object:
    return None if x is None else to_dlpack(x.detach() if x.requires_grad else x)


class _Shared:
    """Norm and rope as the native module takes them. Keeps alive what it points to."""

    def __init__(self, norm: QKNorm | None, rope: Rope | None) -> None:
        self.norm = self.rope = None
        if norm is not None:
            self.weights = [_weights(x) for x in (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)]
            self.norm = (_KINDS[norm.kind], norm.over == "all", norm.eps, *map(_capsule, self.weights))
        if rope is not None:
            self.tables = [x if x.ndim == 4 else x.unsqueeze(2) for x in (rope.cos, rope.sin)]
            self.rope = (_STYLES[rope.style], *map(_capsule, self.tables))


def _temporal_arguments(c: TemporalCall, out: Tensor, lse: Tensor | None, shared: _Shared) -> tuple:
    lengths = None if c.lengths is None else c.lengths.tolist()
    return (
        *(_capsule(c.q), _capsule(c.k), _capsule(c.v), _capsule(out), _capsule(lse)),
        *(lengths, mask_numbers(c.mask), c.q_start, c.scale, shared.norm, shared.rope, torch.get_num_threads()),
    )


def _temporal_forward(c: TemporalCall) -> tuple[Tensor, ...]:
    out, lse = c.empty_outputs()
    native().temporal_attention_forward(*_temporal_arguments(c, out, lse if c.lse else None, _Shared(c.norm, c.rope)))
    return out, lse


def _temporal_backward(
    c: TemporalCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    out, lse = outputs
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dout, dlse = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (dout, dlse))
    found: Gradients = {}

    # Gradients of q, k and v; also where only a weight behind them wants one.
    if c.packed is not None:
        found["q"] = torch.empty(c.packed.shape, dtype=c.packed.dtype)
        gradients: tuple[Tensor | None, ...] = found["q"].unbind(3)
    else:
        for name, x in (("q", c.q), ("k", c.k), ("v", c.v)):
            behind = {"q": {"q_weight", "q_bias", "cos", "sin"}, "k": {"k_weight", "k_bias", "cos", "sin"}, "v": set()}
            if name in wanted or wanted & behind[name]:
                found[name] = torch.empty(x.shape, dtype=x.dtype)
        gradients = tuple(found.get(name) for name in "qkv")

    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    table = None if c.rope is None or not wanted & {"cos", "sin"} else c.rope.cos
    per_position = table is not None and table.shape[1] > 1
    units = c.q.shape[2] if per_position else c.q.shape[0] * c.q.shape[2]
    sums = any(name in wanted for name in names) or table is not None
    items = min(units, _SUM_PARTS) if sums else min(units, max(64 * torch.get_num_threads(), units // 64))
    weights: list[Tensor | None] = [None] * 4
    if c.norm is not None:
        given = (c.norm.q_weight, c.norm.k_weight, c.norm.q_bias, c.norm.k_bias)
        for i, (name, weight) in enumerate(zip(names, given)):
            if name in wanted and weight is not None:
                weights[i] = torch.zeros(items, weight.numel())
    tables: list[Tensor | None] = [None, None]
    if table is not None:
        shape = (table.shape[0], table.shape[1], table.shape[2] if table.ndim == 4 else 1, table.shape[-1])
        tables = [torch.zeros(shape if per_position else (items, *shape)) for _ in range(2)]
    views = [x if x is None or per_position else x[0] for x in tables]

    shared = _Shared(c.norm, c.rope)
    native().temporal_attention_backward(
        *_temporal_arguments(c, out, lse, shared),
        *(_capsule(x) for x in (dout, dlse, *gradients)),
        items,
        [_capsule(x) for x in weights],
        *(_capsule(x) for x in views),
        0 if per_position or views[0] is None else views[0].numel(),
    )
    for name, part in zip(names, weights):
        if part is not None:
            found[name] = part.sum(0, dtype=torch.float64)
    for name, part in zip(("cos", "sin"), tables):
        if part is not None and table is not None:
            total = part if per_position else part.sum(0, dtype=torch.float64)
            found[name] = total.reshape(table.shape)
    return found


def _temporal_why_not(c: TemporalCall) -> str | None:
    return _why_not(c.q.device.type, c.q.dtype, c.q.shape[-1])


BACKEND = Backend(
    name="cpu",
    missing=missing,
    operators={"temporal_attention": Implementation(_temporal_forward, _temporal_backward, _temporal_why_not)},
)
