"""The smallest transformer around vdcore's operators.

Not a :class:`vdcore.models.VDiT`, which does not return the lse that an experiment needs, and whose gates are closed at
first: trained as long as this net needs to remember every object within its reach, a VDiT remembered 0.7 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdcore import patchify, spatial_attention, temporal_attention, unpatchify, video_attention
from vdcore.mask import FrameMask

KINDS = ("spatial", "temporal", "full")


class Attention(nn.Module):
    """One of ``KINDS`` on normed tokens ``(B, T, S, C)``, between two projections."""

    def __init__(self, width: int, heads: int, kind: str, mask: FrameMask) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Attention: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.heads, self.kind, self.mask = heads, kind, mask
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """Packed ``(B, T, S, 3, H, D)``."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))

    def attend(self, qkv: Tensor) -> Any:
        """What the operator returns, and its lse ``(B, T, S, H)``."""
        if self.kind == "spatial":
            return spatial_attention(qkv, return_lse=True)
        operator = temporal_attention if self.kind == "temporal" else video_attention
        return operator(qkv, mask=self.mask, return_lse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(self.project(x))[0].flatten(-2))

    def weights(self, x: Tensor, frame: int, token: Tensor) -> Tensor:
        """What a token of each clip attends to, ``(B, H, T, S)``, from q, k and the lse that the operator returned.

        ``exp(scale q . k - lse)`` where the mask shows the key, 0 elsewhere.

        Args:
            x: ``(B, T, S, C)``, the layer's input.
            frame: of the token.
            token: ``(B,)``, its index in the frame.
        """
        (B, T, S, _), clips = x.shape, torch.arange(len(x))
        qkv = self.project(x)
        q, k, _ = qkv.unbind(3)
        lse = self.attend(qkv)[1][clips, frame, token]  # (B, H)
        scores = torch.einsum("bhd,btshd->bhts", q[clips, frame, token] * q.shape[-1] ** -0.5, k)
        seen = torch.arange(T) == frame if self.kind == "spatial" else self.mask.visible(T)[frame]
        seen = seen[None, :, None].expand(B, T, S)
        if self.kind == "temporal":
            seen = seen & (torch.arange(S) == token[:, None, None])
        return torch.where(seen[:, None], (scores - lse[:, :, None, None]).exp(), 0.0)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class VideoNet(nn.Module):
    """Patches, layers of attention each, an MLP after every ``len(layers)`` of them, patches.

    Args:
        size: ``(T, H, W)`` of the clips, which are RGB.
        patch: ``(ph, pw)``, pixels; patches are one frame deep.
        width: channels per token.
        blocks: how many.
        layers: of a block, from ``KINDS``, in order.
        heads: of attention.
        mask: which frames ``"temporal"`` and ``"full"`` see.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        patch: tuple[int, int],
        *,
        width: int,
        blocks: int,
        layers: Sequence[str],
        heads: int = 4,
        mask: FrameMask = FrameMask(),
    ) -> None:
        super().__init__()
        T, H, W = size
        self.patch, self.grid = (1, *patch), (T, H // patch[0], W // patch[1])
        rows = 3 * patch[0] * patch[1]
        self.into = nn.Parameter(torch.randn(width, 3, *self.patch) * rows**-0.5)
        self.back = nn.Parameter(torch.zeros(rows, width))
        self.place = nn.Parameter(torch.randn(self.grid[1] * self.grid[2], width) * 0.5)
        self.time = nn.Parameter(torch.randn(T, 1, width) * 0.5)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.extend(Attention(width, heads, kind, mask) for kind in layers)
            self.blocks.append(MLP(width))
        self.norm = nn.LayerNorm(width)

    def tokens(self, video: Tensor) -> Tensor:
        """``(B, T, S, C)``, with learned embeddings of place and time."""
        return patchify(video, self.into) + self.place + self.time

    def forward(self, video: Tensor) -> Tensor:
        x = self.tokens(video)
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.norm(x), self.back, channels=3, patch=self.patch, grid=self.grid)
