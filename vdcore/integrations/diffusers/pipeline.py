"""The models of diffusers in what a swap is given: a model, a part of one, a wrapper around one, or a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from vdcore.integrations.report import Report


def models_of(model_or_pipeline: Any, report: Report, verb: str) -> Iterator[tuple[str, nn.Module]]:
    """The models to swap, with the prefix of their modules' names."""
    if isinstance(model_or_pipeline, nn.Module):
        # A block, or another part of a model, is swapped as it is.
        yield from list(models_inside(model_or_pipeline)) or [("", model_or_pipeline)]
        return
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"{verb}: model_or_pipeline must be a model or a pipeline of diffusers, "
            f"got {type(model_or_pipeline).__name__}"
        )
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        inside = list(models_inside(component))
        if not inside:
            report.add_left(name, type(component).__name__, "not a model of diffusers")
        for path, model in inside:
            if any(".autoencoders." in base.__module__ for base in type(model).__mro__):
                report.add_left(f"{name}.{path}".rstrip("."), type(model).__name__, "an autoencoder")
            else:
                yield f"{name}.{path}", model


def models_inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of diffusers in a module, which may be one, or wrap one; each with a prefix for names."""
    within: set[nn.Module] = set()
    for name, child in module.named_modules():
        if child not in within and isinstance(child, ModelMixin):
            within.update(child.modules())
            yield f"{name}." if name else "", child
