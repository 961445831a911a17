"""Temporal blocks on a CPU without gradients: only attention sees the whole clip, all else runs some tokens at a time.

What lies between two matrix products of a block costs the traffic of its rows. Run on a few thousand tokens, the rows
that one product leaves are in the cache when the next takes them, and neither the hidden rows of a feed-forward nor
what it returns ever exist for the whole clip. A residual is the addend of the product before it, and costs nothing.
Backward needs all these rows, and a GPU all tokens at once: there blocks run as their forward says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers.factorized import TemporalAttention
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.swap import is_of, is_plain
from vdcore.modes import is_differentiated

# Hidden rows of a feed-forward that stay in a last level of cache; with fewer tokens than these the matrix products
# read their weights too often.
CACHE_BYTES, LEAST_TOKENS = 24 * 2**20, 1024

# Functions of the host whose mathematics this file relies on.
RELIES = (FeedForward.forward, GEGLU.forward, GEGLU.gelu, GELU.forward, GELU.gelu)


class Piece(NamedTuple):
    """Neighbouring tokens of sample ``b``: of frames ``first`` to ``last``, both included."""

    b: int
    first: int
    last: int


def tokens_at_once(block: nn.Module, x: Tensor, context: Tensor | None = None) -> int | None:
    """How many tokens of ``x (B, T, S, C)`` to take at a time; None: the block is not one for this file.

    That is where a backward, another device, a compiler, a hook or someone's processor wants the whole clip, where the
    clip is small, and where the text has several tokens.
    """
    if is_differentiated() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu") or (context is not None and context.shape[1] > 1):
        return None
    width = max((m.out_features for m in block.modules() if isinstance(m, nn.Linear)), default=1)
    count = max(LEAST_TOKENS, CACHE_BYTES // (width * x.element_size()))
    known = count < x.shape[1] * x.shape[2] and all(_is_known(m, x.dtype) for m in block.modules())
    known = known and all(is_of(module, kind) for module, kind in _not_called(block))
    return count if known else None


@dataclass
class Stage:
    """What a block does between one attention and the next, each part once per sample or once for all of them.

    Args:
        leave: adds the attention before to the block's stream.
        feed: a feed-forward layer that adds to the stream, after ``norm``.
        enter: the norm whose rows are projected for the attention after.
    """

    leave: Sequence[Residual] = ()
    norm: Sequence[Norm] = ()
    feed: Sequence[FeedForwardResidual] = ()
    enter: Sequence[Norm] = ()

    def __call__(self, piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> Tensor:
        """The stream ``x (n, C)`` goes on in ``out``, where it may be already; returns the rows to project."""
        if self.leave:
            _of(self.leave, piece).write(x, attended, out)
            x = out
        if self.feed:
            _of(self.feed, piece).write(x, _of(self.norm, piece)(x, piece), out)
            x = out
        return _of(self.enter, piece)(x, piece) if self.enter else x

    @property
    def writes(self) -> bool:
        return bool(self.leave or self.feed)


Step = TypeVar("Step")


def _of(steps: Sequence[Step], piece: Piece) -> Step:
    return steps[piece.b if len(steps) > 1 else 0]


def run(x: Tensor, count: int, attentions: Sequence[Any], stages: Sequence[Stage]) -> Tensor:
    """A block of stages with attention between them: ``(B, T, S, C)`` in and out."""
    places, sizes = pieces(x, count)

    def split(rows: Tensor) -> Sequence[Tensor]:
        return rows.flatten(0, 2).split(sizes)

    x = x.contiguous()
    out = torch.empty_like(x)
    stream, outputs = split(x), split(out)
    attended: Sequence[Tensor | None] = [None] * len(places)
    for stage, attn in zip(stages, (*attentions, None)):
        projections = [] if attn is None else [Projection(linear) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        projected = [x.new_empty(*x.shape[:-1], projection.width) for projection in projections]
        targets = [split(y) for y in projected]
        for i, place in enumerate(places):
            rows = stage(place, stream[i], outputs[i], attended[i])
            for projection, target in zip(projections, targets):
                projection.write(rows, target[i])
        stream = outputs if stage.writes else stream
        attended = [None] * len(places)  # its memory is free before there is more
        if attn is not None:
            q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in projected)
            attended = split(attn.processor.attend_normed(attn, q, k, v).flatten(-2))
            del q, k, v, target
        del projected, targets
    return out


def pieces(x: Tensor, count: int) -> tuple[list[Piece], list[int]]:
    """About ``count`` neighbouring tokens at a time: whole frames, or part of one. Their places and numbers."""
    B, T, S, _ = x.shape
    groups = -(-T // max(1, count // S))
    parts = 1 if groups < T else -(-S // count)
    frames = list(pairwise(T * i // groups for i in range(groups + 1)))
    places, sizes = [], []
    for b in range(B):
        for t, stop in frames:
            last, tokens = stop - 1, (stop - t) * S
            cuts = [tokens * i // parts for i in range(parts + 1)]
            places += [Piece(b, t, last)] * parts
            sizes += [stop - start for start, stop in pairwise(cuts)]
    return places, sizes


def _not_called(block: Any) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules of a block whose forward does not run here, each with the class whose forward that is."""
    for attn in (block.attn1, block.attn2):
        if attn is not None:
            yield attn, Attention
            yield from ((layer, nn.Dropout) for layer in attn.to_out[1:])
    for name in ("ff_in", "ff"):
        ff = getattr(block, name, None)
        if type(ff) is FeedForward:
            yield from ((layer, nn.Dropout) for i, layer in enumerate(ff.net) if i not in (0, 2))
    if getattr(block, "pos_embed", None) is not None:
        yield block.pos_embed, SinusoidalPositionalEmbedding


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

    The matrix product adds x itself. A gate goes into the weights where the rows to be gated are twice as many. With
    ``ones`` the rows y may start with a 1, which the bias is the weight of: then nothing is left to add.
    """

    def __init__(
        self, linear: Any, tokens: int, gate: Tensor | None = None, row: Tensor | None = None, ones: bool = False
    ) -> None:
        self.linear, self.gate, self.row = linear, gate, row
        self.weight: Tensor | None = None
        self.ones = False
        if type(linear) is not nn.Linear:
            return
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        if gate is not None:
            if tokens < 2 * linear.in_features or weight.dtype != torch.float32:
                return
            bias = None if bias is None else bias * gate
        self.row = bias if row is None else row if bias is None else bias + row
        self.ones = ones and self.row is not None and tokens >= linear.in_features
        if self.ones:
            both = _aligned(len(weight), weight.shape[1], weight)[:, LEAD - 1 :]
            assert self.row is not None
            both[:, 0], self.row = self.row.detach(), None
            if gate is None:
                both[:, 1:].copy_(weight)
            else:
                torch.mul(weight, gate[:, None], out=both[:, 1:])
            weight = both
        elif gate is not None:
            weight = weight * gate[:, None]
        self.weight = weight.t()

    def write(self, x: Tensor, y: Any, out: Tensor) -> None:
        if self.weight is None and self.gate is not None:
            torch.addcmul(x, self.linear(y), self.gate, out=out)
        elif self.weight is None:
            torch.add(x, self.linear(y), out=out)
        elif self.row is not None and x is not out:  # instead of the product's copy of x
            torch.add(x, self.row, out=out).addmm_(y, self.weight)
            return
        else:
            torch.addmm(x, y, self.weight, out=out)
        if self.row is not None:
            out.add_(self.row)


class Norm:
    """``norm(x) * (1 + scale) + shift`` in one pass; scale ``(C,)``, shift ``(C,)`` or of every frame ``(T, C)``.

    A layer norm is torch's with other weights: on the few rows of a piece it costs less to call than ``modulate``.
    """

    def __init__(self, norm: Any, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        self.norm, self.scale, self.shift = norm, scale, shift
        self.is_layer = type(norm) is nn.LayerNorm
        if not self.is_layer:
            return
        weight, bias = norm.weight, norm.bias
        if scale is not None:
            factor = 1 + scale.float()
            weight, bias = (factor if weight is None else weight * factor), (None if bias is None else bias * factor)
        if shift is not None:
            bias = shift.float() if bias is None else bias + shift.float()
        if weight is not None and bias is not None and weight.dtype != bias.dtype:
            weight, bias = weight.float(), bias.float()
        self.weight, self.bias = weight, bias  # the bias (C,) or (T, C)

    def __call__(self, x: Tensor, piece: Piece) -> Tensor:
        if not self.is_layer:
            y = self.norm(x)
            y = y if self.scale is None else y * (1 + self.scale)
            return y if self.shift is None else _of_frames(y, piece, self.shift)
        bias, shape = self.bias, self.norm.normalized_shape
        if bias is None or bias.ndim == 1:
            return F.layer_norm(x, shape, self.weight, bias, self.norm.eps)
        if piece.first == piece.last:
            return F.layer_norm(x, shape, self.weight, bias[piece.first], self.norm.eps)
        frames = x.view(1, piece.last - piece.first + 1, -1, x.shape[-1])
        shift, scale = bias[None, piece.first : piece.last + 1], bias.new_zeros(1, x.shape[-1])
        return vdcore.modulate(frames, shift, scale, weight=self.weight, eps=self.norm.eps).view(x.shape)


def _of_frames(x: Tensor, piece: Piece, shift: Tensor) -> Tensor:
    """Rows plus a shift ``(C,)``, or that of their frame in ``(T, C)``."""
    if shift.ndim == 1:
        return x + shift
    of_frames = x.unflatten(0, (piece.last - piece.first + 1, -1))
    return (of_frames + shift[piece.first : piece.last + 1, None]).flatten(0, 1)


class Hidden:
    """Hidden rows of the feed-forward layers of a block, in the same memory from piece to piece."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def rows(self, n: int, width: int, used: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, width)`` for a product to fill, and a 1 with the first ``used`` of them: ``(n, 1 + used)``."""
        if self._memory is None or self._memory.shape[0] < n or self._memory.shape[1] != width + LEAD:
            self._memory = _aligned(n, width, like)
            self._memory[:, LEAD - 1] = 1
            self._views.clear()
        if (n, width, used) not in self._views:
            memory = self._memory[:n]
            self._views[n, width, used] = memory[:, LEAD:], memory[:, LEAD - 1 : LEAD + used]
        return self._views[n, width, used]


# Columns before a matrix, the last of which is for the 1 or the bias: those of the matrix stay aligned.
LEAD = 16


def _aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, LEAD + columns)


class FeedForwardResidual:
    """``out = x + gate * ff(y)``, the activation computed in place; gate ``(C,)``."""

    def __init__(self, ff: Any, tokens: int, hidden: Hidden, gate: Tensor | None = None) -> None:
        self.ff, self.hidden, self.gate = ff, hidden, gate
        known = type(ff) is FeedForward and len(ff.net) >= 3 and unknown_source(FeedForward.forward) is None
        self.first: Any = ff.net[0] if known else ff
        kind = type(self.first)
        in_place = known and kind in (GEGLU, GELU) and unknown_source(kind.forward, kind.gelu) is None
        self.projection = Projection(self.first.proj) if in_place else None
        self.add = Residual(ff.net[2], tokens, gate, ones=in_place) if known else None

    def write(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        if self.add is None:
            rows = self.ff(y)
            torch.add(x, rows if self.gate is None else rows * self.gate, out=out)
        elif self.projection is None:
            self.add.write(x, self.first(y), out)
        else:
            self.add.write(x, self.activated(y), out)

    def activated(self, y: Tensor) -> Tensor:
        projection = self.projection
        assert projection is not None and self.add is not None
        gated = type(self.first) is GEGLU
        used = projection.width // 2 if gated else projection.width
        rows, with_one = self.hidden.rows(len(y), projection.width, used, y)
        projection.write(y, rows)
        if gated:
            rows[:, :used].mul_(torch.ops.aten.gelu_(rows[:, used:]))
        else:
            torch.ops.aten.gelu_(rows, approximate=self.first.approximate)
        return with_one if self.add.ones else with_one[:, 1:]
