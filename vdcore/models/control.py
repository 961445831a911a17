"""A second stream of frames, such as depth, that steers a trained model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vdcore.models.cache import FrameCache
from vdcore.models.embedding import PatchEmbedding
from vdcore.models.vdit import VDiT
from vdcore.parallel.gradients import scale_gradient


class DepthControl(nn.Module):
    """A trainable copy of a model's first blocks, which sees depth too and adds to what the blocks return.

    ControlNet (Zhang et al. 2023) for transformers, as in PixArt-delta (Chen et al. 2024): depth enters the copy
    through an embedding that starts at 0, and what copied block ``i`` returns is added, through a projection that
    starts at 0, after the model's block ``i``. So at first the model is what it was. To train the control alone::

        model.requires_grad_(False)
        control = DepthControl(model, blocks=6)
        out = model(video, timestep, control=control(video, timestep, depth))

    Args:
        model: whose first blocks and embeddings are copied.
        blocks: how many; None: half of them.
        channels: of the depth stream.

    Raises:
        ValueError: if the model has fewer blocks.
    """

    def __init__(self, model: VDiT, blocks: int | None = None, channels: int = 1) -> None:
        super().__init__()
        config = model.config
        blocks = (config.depth + 1) // 2 if blocks is None else blocks
        if not 1 <= blocks <= config.depth:
            raise ValueError(f"DepthControl: blocks must be 1 to {config.depth}, the model's depth, got {blocks}")
        like = model.patch.weight
        with torch.device(like.device):
            self.copy = VDiT(replace(config, depth=blocks))
            self.hint = PatchEmbedding(channels, config.width, config.patch)
            self.outputs = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(blocks))
        self.copy.peers, self.copy.plan = model.peers, model.plan
        for parameter in (*self.hint.parameters(), *self.outputs.parameters()):
            nn.init.zeros_(parameter)
        del self.copy.final
        names = self.copy.state_dict().keys()
        self.copy.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
        self.to(like.dtype)

    def forward(
        self,
        video: Tensor,
        timestep: Tensor,
        depth: Tensor,
        *,
        cache: FrameCache | None = None,
        keep: bool = False,
        frames: int | None = None,
        **given: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """What to add after each of the model's first blocks, the ``control`` of :meth:`VDiT.forward`.

        Args:
            video, timestep, keep, frames: what the model gets.
            depth: ``(B, channels, T, H, W)``, of the video's size.
            cache: of this control's :meth:`new_cache`.
            given: ``text``, ``text_lengths``, ``label`` and ``positions`` that the model gets.

        Returns:
            ``(B, T', S, C)`` per copied block.

        Raises:
            ValueError: if the depth stream has another size than the video.
        """
        expected = (len(video), self.hint.weight.shape[1], *video.shape[2:])
        if depth.shape != expected:
            shape = tuple(depth.shape)
            raise ValueError(f"DepthControl: depth must be (B, channels, T, H, W) = {expected}, got {shape}")
        ranks = self.copy.ranks
        x, context = self.copy.embed(video, timestep, cache=cache, frames=frames, **given)
        x = x + self.hint(scale_gradient(depth, 1 / ranks))
        found = []
        for i, output in enumerate(self.outputs):
            x = self.copy.run(i, x, context, cache)
            found.append(scale_gradient(output(x), ranks))
        if cache is not None and keep:
            cache.frames += context.grid[0]
        return tuple(found)

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        frames: int | None = None,
        dtype: torch.dtype | None = None,
        relative: bool = False,
    ) -> FrameCache:
        """As :meth:`VDiT.new_cache`, for the copied blocks."""
        return self.copy.new_cache(batch, height, width, frames=frames, dtype=dtype, relative=relative)
