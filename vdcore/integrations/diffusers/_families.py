"""Which file serves which class of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.transformer_temporal import (
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from vdcore.integrations.diffusers import _frames, _rebound, latte, motion, svd
from vdcore.integrations.diffusers._clip import Clip, Grid
from vdcore.integrations.diffusers._swap import Change, Processor

Plan = Callable[[Any, Clip], "list[Change] | str"]

# Modules that are served as a whole, with all the attention in their temporal blocks.
FACTORISED: dict[type[nn.Module], Plan] = {
    AnimateDiffTransformer3D: motion.plan,
    LatteTransformer3DModel: latte.plan,
    TransformerSpatioTemporalModel: svd.plan,
    TransformerTemporalModel: motion.plan,
}

# Processors of full-3D models with the class that serves each, and the fingerprint of the code that it knows.
PROCESSORS: dict[type, tuple[type[Processor], str]] = {}

# Models whose attention runs over all frames, and how the grid of tokens follows from the arguments of their forward.
GRIDS: dict[type[nn.Module], Callable[..., Grid]] = {}


def processor_for(attn: Any) -> tuple[type[Processor] | None, str | None]:
    """The class that serves an attention module, or the reason why there is none."""
    if type(attn.processor) in _frames.HOSTS:
        reason = _frames.why_not(attn)
        if reason is None:
            return _frames.SpatialAttention, None
    reason = _rebound.why_not(attn)
    return (_rebound.rebound_class(type(attn.processor)), None) if reason is None else (None, reason)
