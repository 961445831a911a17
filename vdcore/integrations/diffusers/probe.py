"""Looks at the attention over a clip in every layer of a model, while it runs dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vdcore.integrations.diffusers import swap_in, swap_out
from vdcore.integrations.diffusers.clip import Clip, watch_of
from vdcore.integrations.diffusers.layers import layers_of
from vdcore.integrations.diffusers.pipeline import models_of
from vdcore.integrations.report import Report
from vdcore.mask import FrameMask


@contextmanager
def probed(model_or_pipeline: Any, probe: Callable[..., None]) -> Iterator[list[str]]:
    """Inside, all layers see everything, and show the probe what they attend with; names of the layers.

    Afterwards the models are swapped as they were, or not.

    Args:
        probe: called with the layer's name, ``q, k, v`` ``(B, T, S, heads, D)``, rows and columns, and what else
            :func:`vdcore.video_attention` is told, a mask aside.

    Raises:
        ValueError: if a model's frames are not known, or none has attention over a clip.
    """
    found = [model for _, model in models_of(model_or_pipeline, Report(), "swap_in")]
    before = {model: watch for model in found if (watch := watch_of(model)) is not None}
    for model in before:
        swap_out(model)
    try:
        swap_in(model_or_pipeline, FrameMask.full())
        names = []
        for path, model in models_of(model_or_pipeline, Report(), "swap_in"):
            watch = watch_of(model)
            assert watch is not None
            for block, attending in layers_of(model, watch.clip, path).items():
                names.append(path + block)
                clip = Clip(FrameMask.full(), of=watch.clip)
                clip.probe = partial(probe, path + block)
                for one in attending:
                    one.processor.clip = clip
        yield names
    finally:
        for model in found:
            swap_out(model)
        for model, watch in before.items():
            swap_in(model, watch.settings.mask, watch.settings.dense_layers)
            again = watch_of(model)
            assert again is not None
            again.settings, again.clip.switch.steps = watch.settings, watch.clip.switch.steps
