"""Temporal blocks on a CPU without gradients: only attention sees the whole clip, all else runs some tokens at a time.

What lies between two matrix products of a block costs the traffic of its rows. Run on a few thousand tokens, the rows
that one product leaves are in the cache when the next takes them, and neither the hidden rows of a feed-forward nor
what it returns ever exist for the whole clip. A residual is the addend of the product before it, and costs nothing.
Backward needs all these rows, and a GPU all tokens at once: there blocks run as their forward says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from vdcore.integrations.diffusers._attention import is_plain
from vdcore.integrations.diffusers._frames import TemporalAttention
from vdcore.integrations.diffusers._host import unknown_source

# Hidden rows of a feed-forward that stay in a last level of cache; with fewer tokens than these the matrix products
# read their weights too often.
CACHE_BYTES, LEAST_TOKENS = 16 * 2**20, 1024

# Functions of the host whose mathematics this file relies on.
RELIES = (FeedForward.forward, GEGLU.forward, GEGLU.gelu, GELU.forward, GELU.gelu)


class Piece(NamedTuple):
    """Neighbouring tokens of sample ``b``: of frames ``first`` to ``last``, both included."""

    b: int
    first: int
    last: int


# Takes the piece, its tokens of the block's input, of its output, and of the attention before, if there was one:
# ``(n, C)`` each. It fills the output, and returns the rows to project for the attention after it, if there is one.
Stage = Callable[[Piece, Tensor, Tensor, "Tensor | None"], "Tensor | None"]


def tokens_at_once(block: nn.Module, x: Tensor, context: Tensor | None = None) -> int | None:
    """How many tokens of ``x (B, T, S, C)`` to take at a time; None: the block is not one for this file.

    That is where a backward, another device, a compiler, a hook or someone's processor wants the whole clip, where the
    clip is small, and where the text has several tokens.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu") or (context is not None and context.shape[1] > 1):
        return None
    width = max((m.out_features for m in block.modules() if isinstance(m, nn.Linear)), default=1)
    count = max(LEAST_TOKENS, CACHE_BYTES // (width * x.element_size()))
    if count >= x.shape[1] * x.shape[2] or not all(_is_known(m, x.dtype) for m in block.modules()):
        return None
    hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    # Over fake tensors these are a memory tracker's, which looks at modules and not at tokens.
    return None if hooks and not isinstance(x, FakeTensor) else count


def run(x: Tensor, count: int, attentions: Sequence[Any], stages: Sequence[Stage]) -> Tensor:
    """A block of stages with attention between them: ``(B, T, S, C)`` in and out."""
    places, sizes = pieces(x, count)

    def split(rows: Tensor) -> Sequence[Tensor]:
        return rows.flatten(0, 2).split(sizes)

    x = x.contiguous()
    out = torch.empty_like(x)
    inputs, outputs, attended = split(x), split(out), None
    for stage, attn in zip(stages, (*attentions, None)):
        projections = [] if attn is None else [Projection(linear) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        projected = [x.new_empty(*x.shape[:-1], projection.width) for projection in projections]
        targets = [split(y) for y in projected]
        before = [None] * len(places) if attended is None else split(attended)
        for i, (place, given, result, heads) in enumerate(zip(places, inputs, outputs, before)):
            rows = stage(place, given, result, heads)
            for projection, target in zip(projections, targets):
                projection.write(rows, target[i])
        if attn is not None:
            attended = before = None
            q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in projected)
            attended = attn.processor.attend_normed(attn, q, k, v).flatten(-2)
            del q, k, v, projected, targets, target
    return out


def pieces(x: Tensor, count: int) -> tuple[list[Piece], list[int]]:
    """About ``count`` neighbouring tokens at a time: whole frames, or part of one. Their places and numbers."""
    B, T, S, _ = x.shape
    frames = max(1, count // S)
    parts = 1 if frames > 1 else -(-S // count)
    places, sizes = [], []
    for b in range(B):
        for t in range(0, T, frames):
            last = min(t + frames, T) - 1
            tokens = (last - t + 1) * S
            cuts = [tokens * i // parts for i in range(parts + 1)]
            places += [Piece(b, t, last)] * parts
            sizes += [stop - start for start, stop in pairwise(cuts)]
    return places, sizes


def _is_known(module: nn.Module, dtype: torch.dtype) -> bool:
    """Calling the module piece by piece, or using its parameters instead, changes nothing."""
    if not is_plain(module) or (isinstance(module, nn.Dropout) and module.training and module.p > 0):
        return False
    if any(p.dtype != dtype for p in module.parameters(recurse=False)) or getattr(module, "fused_projections", False):
        return False
    processor = getattr(module, "processor", None)
    return processor is None or (isinstance(processor, TemporalAttention) and processor.why_not_now() is None)


# ---- Steps: rows are (n, C) ----


class Projection:
    """A linear layer that writes where it is told to; layers of another kind are called."""

    def __init__(self, linear: Any) -> None:
        self.linear, self.width = linear, linear.out_features
        self.weight = linear.weight.t() if type(linear) is nn.Linear else None

    def write(self, rows: Any, out: Tensor) -> None:
        if self.weight is None:
            out.copy_(self.linear(rows))
        elif self.linear.bias is None:
            torch.mm(rows, self.weight, out=out)
        else:
            torch.addmm(self.linear.bias, rows, self.weight, out=out)


class Residual:
    """``out = x + gate * linear(y) + row``; gate and row ``(C,)``.

    The matrix product adds x itself. A gate goes into the weights where the rows to be gated are many more than these.
    """

    def __init__(self, linear: Any, tokens: int, gate: Tensor | None = None, row: Tensor | None = None) -> None:
        self.linear, self.gate, self.row = linear, gate, row
        self.weight: Tensor | None = None
        if type(linear) is not nn.Linear:
            return
        weight, bias = linear.weight, linear.bias
        if gate is not None:
            if tokens < 8 * linear.in_features or weight.dtype != torch.float32:
                return
            weight, bias = weight * gate[:, None], None if bias is None else bias * gate
        self.weight = weight.t()
        self.row = bias if row is None else row if bias is None else bias + row

    def write(self, x: Tensor, y: Any, out: Tensor) -> None:
        if self.weight is not None:
            torch.addmm(x, y, self.weight, out=out)
        elif self.gate is not None:
            torch.addcmul(x, self.linear(y), self.gate, out=out)
        else:
            torch.add(x, self.linear(y), out=out)
        if self.row is not None:
            out.add_(self.row)


class Norm:
    """``norm(x) * (1 + scale) + shift`` in one pass; scale and shift ``(C,)``."""

    def __init__(self, norm: Any, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        self.norm, self.scale, self.shift = norm, scale, shift
        if type(norm) is not nn.LayerNorm:
            return
        weight, bias = norm.weight, norm.bias
        if scale is not None:
            factor = 1 + scale.float()
            weight, bias = (factor if weight is None else weight * factor), (None if bias is None else bias * factor)
        if shift is not None:
            bias = shift.float() if bias is None else bias + shift.float()
        if weight is not None and bias is not None and weight.dtype != bias.dtype:
            weight, bias = weight.float(), bias.float()
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if type(self.norm) is nn.LayerNorm:
            return F.layer_norm(x, self.norm.normalized_shape, self.weight, self.bias, self.norm.eps)
        y = self.norm(x)
        y = y if self.scale is None else y * (1 + self.scale)
        return y if self.shift is None else y + self.shift


class FeedForwardResidual:
    """``out = x + gate * ff(y)``, the activation computed in place; gate ``(C,)``."""

    def __init__(self, ff: Any, tokens: int, gate: Tensor | None = None) -> None:
        self.ff = ff
        self.first: Any = ff
        known = type(ff) is FeedForward and len(ff.net) >= 3 and unknown_source(FeedForward.forward) is None
        self.add = Residual(ff.net[2], tokens, gate) if known else None
        self.gate = gate
        self.kind: type | None = None
        self.ones = False  # the bias of the last layer is one more column of its weights
        if not known:
            return
        self.first = ff.net[0]
        kind = type(self.first)
        if kind in (GEGLU, GELU) and type(self.first.proj) is nn.Linear:
            self.kind = None if unknown_source(kind.forward, kind.gelu) else kind
        linear = ff.net[2]
        self.ones = self.kind is GEGLU and self.add.row is linear.bias is not None and tokens >= linear.in_features
        if self.ones:
            self.add.weight, self.add.row = _with_bias(linear).t(), None

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        if self.add is None:
            rows = self.ff(y)
            torch.add(x, rows if self.gate is None else rows * self.gate, out=out)
        else:
            self.add.write(x, self.hidden(y), out)

    def hidden(self, y: Tensor) -> Tensor:
        if self.kind is None:
            return self.first(y)
        hidden = self.first.proj(y)
        if self.kind is GELU:
            return torch.ops.aten.gelu_(hidden, approximate=self.first.approximate)
        half = hidden.shape[-1] // 2
        hidden[:, :half].mul_(torch.ops.aten.gelu_(hidden[:, half:]))
        if self.ones:
            hidden[:, half] = 1  # over a gate that has been used
        return hidden[:, : half + self.ones]


def _with_bias(linear: nn.Linear) -> Tensor:
    """``(C, K + 1)``: weights and bias, rows apart by a multiple of 16 as the matrix product likes them."""
    C, K = linear.weight.shape
    both = linear.weight.new_empty(C, (K // 16 + 1) * 16)[:, : K + 1]
    both[:, :K], both[:, K] = linear.weight, linear.bias
    return both
