"""vdcore in diffusers: one line puts a model on it, one line puts it back.

    from vdcore.integrations.diffusers import swap_in, swap_out

    report = swap_in(pipeline)
    print(report)
    swap_out(pipeline)

Tested with the versions in :data:`TESTED`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from vdcore.integrations.diffusers import _families, patches
from vdcore.integrations.diffusers._clip import Clip
from vdcore.integrations.diffusers._host import TESTED, check_version
from vdcore.integrations.diffusers._report import Entry, Report
from vdcore.integrations.diffusers._swap import (
    Change,
    Processor,
    ServedModule,
    is_served,
    make_all,
    named_modules,
    restore,
)
from vdcore.mask import FrameMask

__all__ = ["TESTED", "Entry", "Report", "swap_in", "swap_out"]


def swap_in(model_or_pipeline: Any, mask: FrameMask | None = None) -> Report:
    """Puts the attention of a video model, and what vdcore fuses around it, on vdcore.

    Only the modules of this model change, and only their processor or class: parameters, hooks and other models stay as
    they are. Calls that vdcore cannot serve exactly are left to diffusers; the report says which and why. Swapping
    again is the same as once.

    Args:
        model_or_pipeline: a diffusers model, or a pipeline, whose models are swapped; its autoencoders are not.
        mask: which frames a frame sees in temporal and in full 3D attention, training-free; None: as trained, exact.
            Under a causal mask text does not attend to video.

    Raises:
        TypeError: if there is no model in it.
        ValueError: if a mask is given and a model's frames are not known.
        RuntimeError: if this version of diffusers was not tested.
    """
    check_version()
    if mask is not None and not isinstance(mask, FrameMask):
        raise TypeError(f"swap_in: mask must be a FrameMask or None, got {type(mask).__name__}")
    report, changes, clips = Report(), [], []
    for path, model in _models(model_or_pipeline, report):
        before = _mask_of(model)
        if before is not None and before != (mask,):
            swap_out(model)
        clip = Clip(mask)
        changes += _plan(model, path, clip, report)
        if mask is not None and type(model) in _families.GRIDS and not is_served_model(model):
            clips.append((clip, model))
    make_all(changes)
    report.note_processors()
    for clip, model in clips:
        clip.watch(model, _families.GRIDS[type(model)])
    return report


def swap_out(model_or_pipeline: Any) -> None:
    """Undoes :func:`swap_in`, bit for bit. A model that was never swapped stays as it is."""
    for _, model in _models(model_or_pipeline, Report()):
        for module in list(model.modules()):
            restore(module)


# ---- What is to be changed ----


def _models(model_or_pipeline: Any, report: Report) -> Iterator[tuple[str, nn.Module]]:
    """The models to swap, with the prefix of their modules' names."""
    if isinstance(model_or_pipeline, nn.Module):
        yield "", model_or_pipeline
        return
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"swap_in: model_or_pipeline must be a model or a pipeline of diffusers, "
            f"got {type(model_or_pipeline).__name__}"
        )
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        module = type(component).__module__
        if not module.startswith("diffusers.") or ".autoencoders." in module:
            reason = "an autoencoder" if ".autoencoders." in module else "not a model of diffusers"
            report.add_left(name, type(component).__name__, reason)
            continue
        yield f"{name}.", component


def _plan(model: nn.Module, path: str, clip: Clip, report: Report) -> list[Change]:
    """The changes of one model, entered into the report."""
    changes: list[Change] = []
    planned: set[nn.Module] = set()
    embeddings = patches.find(model)
    frames_known = type(model) in _families.GRIDS or any(type(m) in _families.FACTORISED for m in model.modules())
    if clip.mask is not None and not frames_known and not is_served_model(model):
        raise ValueError(f"swap_in: mask must be None for {type(model).__name__}, whose frames are not known")
    for name, module in named_modules(model):
        kind = type(module).__name__
        if module in planned or is_served(module):
            _enter(report, path + name, module, changes)
            continue
        found: list[Change] | str | None = None
        if type(module) in _families.FACTORISED:
            found = _families.FACTORISED[type(module)](module, clip)
            if isinstance(found, str) and clip.mask is not None:
                raise ValueError(f"swap_in: mask must be None where {path}{name} cannot be served: {found}")
        elif type(module) in _families.FORWARDS:
            change = _families.change_of_forward(module)
            found = change if isinstance(change, str) else [change]
        elif module in embeddings:
            found = embeddings[module] or patches.plan(module, clip)
        elif hasattr(module, "processor"):
            change = _families.change_of(module, name, clip)
            found = change if isinstance(change, str) else [change]
        elif _attends(module):
            found = "its attention is written into its forward"
        if isinstance(found, str):
            report.add_left(path + name, kind, found)
        elif found:
            changes += found
            planned |= {change.module for change in found}
            if module in planned:
                _enter(report, path + name, module, changes)
    return changes


def _enter(report: Report, name: str, module: nn.Module, changes: list[Change]) -> None:
    kind = type(module).__name__
    for change in changes:
        if change.module is module:
            report.add_served(name, kind, change.serves, module)
            return
    processor = getattr(module, "processor", None)
    serves = processor.SERVES if isinstance(processor, Processor) else type(module).serves  # type: ignore[attr-defined]
    report.add_served(name, kind, serves, module)


def _attends(module: nn.Module) -> bool:
    """A module computes attention itself, without a processor."""
    if list(module.children()) and type(module).__module__.startswith("torch."):
        return False
    names = inspect.unwrap(type(module).forward)
    code = getattr(names, "__code__", None)
    return code is not None and bool({"scaled_dot_product_attention", "softmax"} & set(code.co_names))


def is_served_model(model: nn.Module) -> bool:
    return any(is_served(module) for module in model.modules())


def _mask_of(model: nn.Module) -> tuple[FrameMask | None] | None:
    """The mask that a model was swapped with, in a tuple; None if it is not swapped."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, Processor):
            return (processor.clip.mask,)
    return (None,) if any(isinstance(module, ServedModule) for module in model.modules()) else None
