"""From an image model to a video model that starts as the image model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.models.config import VDiTConfig
from vdcore.models.vdit import VDiT

INFLATED = ("factorized", "alternating")


@torch.no_grad()
def inflate(image_model: VDiT, *, attention: str = "factorized", mask: FrameMask = FrameMask()) -> VDiT:
    """A video model whose output is the image model's on every frame, until its temporal layers have learned.

    Temporal layers are added to the image model's blocks, or between them. What they add to the residual is 0 at first:
    their gate is, under AdaLN-Zero, or else their output projection (as ControlNet's zero convolutions and
    AnimateDiff's motion modules begin), so their first step already learns. Frames are told apart by rotation inside
    temporal attention, which a sum with frame embeddings would not leave the image model.

    Args:
        image_model: with ``attention="spatial"``; it is left as it is, weights are copied.
        attention: ``"factorized"`` or ``"alternating"``.
        mask: of temporal attention.

    Returns:
        The video model; on the same clip its output equals the image model's, bit for bit.

    Raises:
        ValueError: if the image model looks across frames already, or ``attention`` is another.
    """
    image = image_model.config
    if image.attention != "spatial":
        raise ValueError(f"inflate: image_model must have attention='spatial', got {image.attention!r}")
    if attention not in INFLATED:
        raise ValueError(f"inflate: attention must be one of {', '.join(INFLATED)}, got {attention!r}")
    position = "rope" if image.position == "rope" else "sincos+rope"
    apart = attention == "alternating"
    config = replace(image, attention=attention, mask=mask, position=position, depth=image.depth * (1 + apart))
    like = image_model.patch.weight
    with torch.device(like.device):
        model = VDiT(config).to(like.dtype)
    weights, new = image_model.state_dict(), model.state_dict()
    for name, value in weights.items():
        if apart and name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            name = f"blocks.{2 * int(index)}.{rest}"
        new[name] = value if new[name].shape == value.shape else _with_temporal_rows(new[name], value, config)
    model.load_state_dict(new)
    if config.modulation == "single":
        for i in range(config.depth):
            added = {"temporal", "mlp"} if apart else {"temporal"}
            for part in added.intersection(config.parts(i)) if "temporal" in config.parts(i) else ():
                proj = model.get_submodule(f"blocks.{i}.layers.{part}.proj")
                for parameter in proj.parameters():
                    torch.nn.init.zeros_(parameter)
    return model.train(image_model.training)


def _with_temporal_rows(new: Tensor, old: Tensor, config: VDiTConfig) -> Tensor:
    """Modulation of ``(spatial, mlp)`` among the rows of ``(spatial, temporal, mlp)``: shift, scale and gate each."""
    rows = new.clone().unflatten(0, (3, -1))
    rows[0::2] = old.unflatten(0, (2, -1))
    return rows.flatten(0, 1)
