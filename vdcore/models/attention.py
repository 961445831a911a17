"""The attention layers of a block: projections around one operator each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore.mask import FrameMask
from vdcore.models.cache import Place, Ring
from vdcore.models.config import VDiTConfig
from vdcore.models.layout import Split, start_switch
from vdcore.models.position import Rotations, full_channels, neighbor_bias, space_channels
from vdcore.norm import QKNorm
from vdcore.ops import (
    cross_attention,
    gated_attention,
    qk_norm_rope,
    spatial_attention,
    temporal_attention,
    video_attention,
)
from vdcore.ops.choose import has_tangent
from vdcore.parallel.attention import Shared
from vdcore.parallel.halo import halo_of, key_frames
from vdcore.rope import Rope


@dataclass(eq=False)
class Context:
    """What all blocks of a forward pass share.

    Args:
        condition: of timestep and label, ``(B, C)`` or ``(B, T, C)``.
        activated: its SiLU.
        modulation: with adaLN-single, the projection that all blocks share, ``(B, n, C)`` or ``(B, T, n, C)``.
        rotations: rotary tables of this pass's frames.
        text: ``(B, L, C)`` or ``(B, T, L, C)``.
        text_lengths: ``(B,)`` or ``(B, T)``, valid text tokens.
        place: with a cache, where this chunk's keys and values go.
        frame_embedding: ``(T, 1, C)``, what is added to the tokens before the first block that looks across frames.
        grid: token frames, rows and columns (T', H', W').
        mask: in place of the layers' own.
        split: how several processes share the frames. Conditions and ``rotations.time`` are of all frames then, all
            else is of this rank's.
    """

    grid: tuple[int, int, int]
    condition: Tensor
    activated: Tensor
    modulation: Tensor | None = None
    rotations: Rotations = field(default_factory=Rotations)
    text: Tensor | None = None
    text_lengths: Tensor | None = None
    place: Place | None = None
    frame_embedding: Tensor | None = None
    mask: FrameMask | None = None
    split: Split | None = None

    def of_own_frames(self, condition: Tensor) -> Tensor:
        """This rank's frames of a condition; one without frames as it is. ``(B, T, ...)`` to ``(B, T_r, ...)``."""
        if self.split is None or self.condition.ndim == 2:
            return condition
        return self.split.own_frames(condition, 1)


def merged(heads: Any) -> Tensor:
    """``(B, T, S, H, D)`` to ``(B, T, S, C)``, a view."""
    return heads.flatten(-2)


class SelfAttention(nn.Module):
    """What the layers below share: packed projections, QK-norm, output projection."""

    def __init__(self, config: VDiTConfig, branches: int = 1) -> None:
        super().__init__()
        self.mask: Any = config.mask
        self.head_dim, self.branches = config.head_dim, branches
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.width, branches * rows)
        self.proj = nn.Linear(config.width, config.width)
        weights = [nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None for _ in range(2 * branches)]
        self.q_norm, self.k_norm = (nn.ParameterList(w for w in weights[i::2] if w is not None) for i in (0, 1))

    def rotary_dims(self, config: VDiTConfig) -> list[tuple[int, ...]]:
        """Channels of a head that rotate with each axis, by branch; empty without rotary embedding."""
        raise NotImplementedError

    @torch.no_grad()
    def init_neighbor_bias(self, config: VDiTConfig) -> None:
        """Biases of q and k with which attention starts at the neighboring tokens."""
        bias = self.qkv.bias.unflatten(0, (self.branches, -1, self.head_dim))
        for rows, channels in zip(bias, self.rotary_dims(config)):
            if channels:
                q, k = neighbor_bias([n // 2 for n in channels], config.rope_theta, self.heads)
                rows[: self.heads] = q
                rows[self.heads : self.heads + self.kv_heads] = k

    def norm(self, branch: int = 0) -> QKNorm | None:
        return QKNorm(self.q_norm[branch], self.k_norm[branch]) if len(self.q_norm) else None

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, T, S, H, D)`` and k, v ``(B, T, S, G, D)``, views of their projection ``(B, T, S, (H + 2 G) D)``."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in y.split(sizes, -1))
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Packed ``(B, T, S, 3, H, D)`` where there are as many key heads as query heads, else q, k and v."""
        y = self.qkv(x)
        return (y.unflatten(-1, (3, self.heads, self.head_dim)),) if self.kv_heads == self.heads else self.split(y)

    def remember(
        self, qkv: tuple[Tensor, Tensor, Tensor], ring: Ring, place: Place, rope: Rope | None, branch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, and rotates but for a relative ring; writes k and v into it. q, and the keys and values of all frames
        that it sees."""
        q, k, v = qkv
        if has_tangent(k, v):
            raise RuntimeError("VDiT: a cache holds no tangents: call the model without forward-mode derivatives")
        norm, rope = self.norm(branch), None if place.relative else rope
        if norm is not None or rope is not None:
            q, k = qk_norm_rope(q, k, norm=norm, rope=rope)
        return q, *ring.write(k, v, place)

    def against_ring(
        self,
        operator: Callable[..., Any],
        qkv: tuple[Tensor, Tensor, Tensor],
        ring: Ring,
        place: Place,
        rope: Rope | None,
        branch: int = 0,
    ) -> Tensor:
        """The operator on the new frames and on those that the ring holds, rotated here where the ring's keys are not:
        the table has a row for every visible slot, then those of the chunk."""
        seen = self.remember(qkv, ring, place, rope, branch)
        return operator(*seen, q_start=place.visible, rope=rope) if place.relative else operator(*seen, q_start=0)

    def normalized(self, qkv: tuple[Tensor, Tensor, Tensor], rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """q and k as the scores see them, and v: what ranks exchange."""
        q, k, v = qkv
        norm = self.norm()
        return (q, k, v) if norm is None and rope is None else (*qk_norm_rope(q, k, norm=norm, rope=rope), v)

    def across_frames(
        self, operator: Callable[..., Any], x: Tensor, context: Context, ring: Ring | None, rope: Rope | None
    ) -> Tensor:
        """The operator on all frames of ``x``, or with a ring on its new frames and those that the ring holds."""
        if ring is None or context.place is None:
            out = operator(*self.project(x), mask=context.mask or self.mask, norm=self.norm(), rope=rope)
        else:
            out = self.against_ring(operator, self.split(self.qkv(x)), ring, context.place, rope)
        return self.proj(merged(out))


class SpatialAttention(SelfAttention):
    """The tokens of a frame among themselves."""

    def rotary_dims(self, config: VDiTConfig) -> list[tuple[int, ...]]:
        return [space_channels(self.head_dim) if config.position == "rope" else ()]

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        out = spatial_attention(*self.project(x), norm=self.norm(), rope=context.rotations.space)
        return self.proj(merged(out))


class TemporalAttention(SelfAttention):
    """Every position across the frames that the mask shows."""

    def rotary_dims(self, config: VDiTConfig) -> list[tuple[int, ...]]:
        return [(self.head_dim,)]

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        split, rope = context.split, context.rotations.time
        if split is None or split.plan != "halo":  # whole positions
            return self.across_frames(temporal_attention, x, context, ring, rope)
        if rope is not None:
            rope = Rope(split.own_frames(rope.cos, 0), split.own_frames(rope.sin, 0), rope.style)
        q, k, v = self.normalized(self.split(self.qkv(x)), rope)
        halo = halo_of(self.mask, split.sizes[0], split.peers)
        out = temporal_attention(q, *key_frames(halo, k, v), mask=self.mask, q_start=halo.q_start)
        return self.proj(merged(out))


class FullAttention(SelfAttention):
    """All tokens that the mask shows."""

    def rotary_dims(self, config: VDiTConfig) -> list[tuple[int, ...]]:
        return [full_channels(self.head_dim)]

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        split = context.split
        if split is None:
            in_frames = isinstance(self.mask, FrameMask)
            operator = video_attention if in_frames else partial(video_attention, grid=context.grid[1:])
            return self.across_frames(operator, x, context, ring, context.rotations.full)
        shared = Shared(split.peers, split.sizes[0], self.mask, self.head_dim**-0.5, plan=split.plan)
        out, _ = shared.attend(*self.normalized(self.split(self.qkv(x)), context.rotations.full))
        return self.proj(merged(out))


class GatedAttention(SelfAttention):
    """``a * A_s + (1 - a) * A_t`` with ``a = sigmoid(m)``, as the AlphaBlender of Stable Video Diffusion mixes.

    ``m`` is learned: a scalar, one per head, or a linear function of each token. It starts at 0: both count the same.
    """

    def __init__(self, config: VDiTConfig) -> None:
        super().__init__(config, branches=2)
        per_token = config.gate == "token"
        size = config.heads if config.gate == "head" else 1
        self.mix = nn.Linear(config.width, 1) if per_token else nn.Identity()
        self.mix_factor = None if per_token else nn.Parameter(torch.zeros(size, 1))

    def rotary_dims(self, config: VDiTConfig) -> list[tuple[int, ...]]:
        return [space_channels(self.head_dim) if config.position == "rope" else (), (self.head_dim,)]

    def alpha(self, x: Tensor) -> Tensor:
        """``(B, T, S, 1, 1)`` per token, ``(H, 1)`` per head, ``(1, 1)``."""
        return torch.sigmoid(self.mix(x)[..., None] if self.mix_factor is None else self.mix_factor)

    def shared(self, x: Tensor, context: Context, split: Split) -> Tensor:
        """On several processes: tokens are on their way to temporal attention, and back, while spatial computes.

        Nothing but the tokens of x and the temporal results is sent: queries, keys and values of temporal attention
        are projected where they are needed.
        """
        rotations = context.rotations
        weights, biases = (p.chunk(2) for p in (self.qkv.weight, self.qkv.bias))
        there = start_switch(x, "frames", "tokens", split)
        spatial = self.split(F.linear(x, weights[0], biases[0]))
        temporal = self.split(F.linear(there.finish(), weights[1], biases[1]))
        a_t = temporal_attention(*temporal, mask=self.mask, norm=self.norm(1), rope=rotations.time)
        back = start_switch(a_t, "tokens", "frames", split)
        a_s = spatial_attention(*spatial, norm=self.norm(0), rope=rotations.space)
        return torch.lerp(back.finish(), a_s, self.alpha(x).to(a_s.dtype))

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        if context.split is not None:
            return self.proj(merged(self.shared(x, context, context.split)))
        spatial, temporal = (self.split(y) for y in self.qkv(x).chunk(2, -1))
        alpha, rotations = self.alpha(x), context.rotations
        if ring is None or context.place is None:
            norm, rope = (self.norm(0), self.norm(1)), (rotations.space, rotations.time)
            mask = context.mask or self.mask
            out = gated_attention(spatial, temporal, alpha, mask=mask, norm=norm, rope=rope)
        else:
            a_s: Any = spatial_attention(*spatial, norm=self.norm(0), rope=rotations.space)
            a_t: Any = self.against_ring(temporal_attention, temporal, ring, context.place, rotations.time, 1)
            out = torch.lerp(a_t, a_s, alpha.to(a_s.dtype))
        return self.proj(merged(out))


class CrossAttention(nn.Module):
    """Tokens to the text of their sample, or of their frame. Neither modulated nor normed, after PixArt-alpha."""

    def __init__(self, config: VDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        assert context.text is not None
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(context.text).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.proj(merged(cross_attention(q, k, v, lengths=context.text_lengths)))


class MLP(nn.Module):
    def __init__(self, config: VDiTConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.up = nn.Linear(config.width, hidden)
        self.proj = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        hidden = self.up(x)
        if not torch.is_grad_enabled():  # in place: a second hidden tensor would be the block's peak of memory
            return self.proj(torch.ops.aten.gelu_(hidden, approximate="tanh"))
        return self.proj(F.gelu(hidden, approximate="tanh"))
