"""The families of diffusers' video models, a file per model, and what serves each of their classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from vdcore.integrations.diffusers import factorized, rebound
from vdcore.integrations.diffusers.blocks import adaln  # noqa: F401, enters itself
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.families import (  # noqa: F401, each enters itself
    allegro,
    cogvideox,
    cosmos,
    hunyuan_video,
    kandinsky,
    latte,
    ltx,
    ltx2,
    mochi,
    motion,
    sana,
    svd,
    wan,
)
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.processor import why_not_processor
from vdcore.integrations.diffusers.registry import FORWARDS, PROCESSORS
from vdcore.integrations.swap import Change, changed_forward, known_as


def change_of_forward(module: nn.Module) -> Change | str:
    """What serves a module of :data:`FORWARDS`, or the reason why nothing does."""
    host: Any = known_as(type(module), FORWARDS)
    if isinstance(host, str):
        return host
    found = FORWARDS[host]
    reason = unknown_source(host.forward, *found.relies) or changed_forward(module)
    return reason or Change.of_forward(module, found.function, found.serves)


def change_of_attention(attn: Any, name: str, clip: Clip) -> Change | str:
    """What serves an attention module outside of factorized blocks, or the reason why nothing does."""
    host: Any = type(attn.processor)
    if isinstance(known_as(host, factorized.HOSTS, "__call__"), type) and factorized.why_not(attn) is None:
        return factorized.SpatialAttention.change(attn, clip)
    base: Any = rebound.Rebound
    known: Any = known_as(host, PROCESSORS, "__call__")
    if isinstance(known, type):
        fused = PROCESSORS[known]
        if not fused.is_video(name):
            clip = Clip(None, beside=clip)
        # From a newer diffusers with other code: its own code runs, with the attention alone served.
        if unknown_source(host.__call__, *fused.RELIES) is None:
            base = fused
    reason = why_not_processor(attn) if base is not rebound.Rebound else rebound.why_not(attn)
    return reason or base.change(attn, clip)
