"""vdcore in diffusers: one line puts a model on it, one line puts it back.

    from vdcore.integrations.diffusers import swap_in, swap_out

    report = swap_in(pipeline)
    print(report)
    swap_out(pipeline)

Tested with the versions in :data:`TESTED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from vdcore.integrations.diffusers import families, registry
from vdcore.integrations.diffusers.blocks import patches
from vdcore.integrations.diffusers.clip import Clip, Grid, Watch, checkpoint_as_host
from vdcore.integrations.diffusers.fingerprints import TESTED, check_version
from vdcore.integrations.diffusers.ranks import models as mesh_models
from vdcore.integrations.diffusers.ranks.mesh import Ranks, ranks_of
from vdcore.integrations.diffusers.registry import grid_of
from vdcore.integrations.report import Entry, Report
from vdcore.integrations.swap import Change, Find, host_type, known_as, names_used, swap
from vdcore.integrations.swap import swap_out as swap_module_out
from vdcore.mask import FrameMask

__all__ = ["TESTED", "Entry", "Report", "swap_in", "swap_out"]


def swap_in(
    model_or_pipeline: Any,
    mask: FrameMask | None = None,
    *,
    mesh: Any = None,
    parts: bool = False,
    plan: str | None = None,
) -> Report:
    """Puts the attention of a video model, and what vdcore fuses around it, on vdcore.

    Only the modules of this model change, and only their processor or class: parameters, hooks and other models stay as
    they are. Calls that vdcore cannot serve exactly are left to diffusers; the report says which and why. Swapping
    again is the same as once.

    Args:
        model_or_pipeline: a diffusers model, or a pipeline, whose models are swapped; its autoencoders are not.
        mask: which frames a frame sees in temporal and in full 3D attention, training-free; None: as trained, exact.
            Under a causal mask text does not attend to video.
        mesh: processes that share the frames of every clip: a ``DeviceMesh`` of one dimension, or diffusers'
            ``ContextParallelConfig``, of which the processes count. Every rank passes the whole clip and gets the
            whole result, and gradients of inputs are whole as well; those of parameters are such that their mean over
            the mesh, what DDP and FSDP2 take, is the gradient of one process. For Latte, SVD, AnimateDiff, Wan and
            CogVideoX; of others the report says that they are left, whole on every rank.
        parts: on a mesh each rank passes and gets its own frames (:func:`vdcore.parallel.shard`), and what else has
            frames alike. The loss is the sum of the ranks' losses then, gradients of inputs the rank's share.
        plan: how attention over all frames is shared out, ``"heads"``, ``"ring"`` or ``"halo"``; None: what sends the
            least bytes (:func:`vdcore.parallel.explain`).

    Raises:
        TypeError: if there is no model in it, or the mesh is none.
        ValueError: if a mask is given and a model's frames are not known; a mesh of several dimensions; parts of a
            pipeline, or of a model that is not served under a mesh.
        RuntimeError: if this version of diffusers was not tested.
    """
    check_version()
    if mask is not None and not isinstance(mask, FrameMask):
        raise TypeError(f"swap_in: mask must be a FrameMask or None, got {type(mask).__name__}")
    ranks = ranks_of(mesh, plan, parts)
    report, models = Report(), []
    hooks: list[Change] = []
    watches: dict[nn.Module, Watch] = {}
    found = list(_models(model_or_pipeline, report, "swap_in"))
    if ranks is not None:
        found = list(_shareable(found, ranks, report, isinstance(model_or_pipeline, nn.Module)))
    for _, model in found:
        _check_frames(model, mask)
    clips = ((model, watch.clip) for _, model in found if (watch := _watch_of(model)) is not None)
    before = {model: clip for model, clip in clips if (clip.mask, clip.ranks) != (mask, ranks)}
    for model in before:
        swap_out(model)
    try:
        for path, model in found:
            watch = _watch_of(model) or watches.get(model)
            if watch is None:
                watch = Watch(Clip(mask, ranks=ranks), _grid_of(model, mask) if ranks is None else None)
                hooks.append(Change.of_hook(model, watch))
            watches[model] = watch
            models.append((path, model, _finder(model, path, watch.clip)))
        swap(models, report, hooks)
        for model, watch in watches.items():
            watch.attending = watch.count(model)
        return report
    except BaseException:
        for model, earlier in before.items():
            swap_in(model, earlier.mask, mesh=earlier.ranks)
        raise


def swap_out(model_or_pipeline: Any) -> None:
    """Undoes :func:`swap_in`, bit for bit. A model that was never swapped stays as it is."""
    for _, model in _models(model_or_pipeline, Report(), "swap_out"):
        swap_module_out(model)
        checkpoint_as_host(model)


# ---- What is to be changed ----


def _models(model_or_pipeline: Any, report: Report, verb: str) -> Iterator[tuple[str, nn.Module]]:
    """The models to swap, with the prefix of their modules' names."""
    if isinstance(model_or_pipeline, nn.Module):
        # A block, or another part of a model, is swapped as it is.
        yield from list(_models_inside(model_or_pipeline)) or [("", model_or_pipeline)]
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
        inside = list(_models_inside(component))
        if not inside:
            report.add_left(name, type(component).__name__, "not a model of diffusers")
        for path, model in inside:
            if any(".autoencoders." in base.__module__ for base in type(model).__mro__):
                report.add_left(f"{name}.{path}".rstrip("."), type(model).__name__, "an autoencoder")
            else:
                yield f"{name}.{path}", model


def _models_inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of diffusers in a module, which may be one, or wrap one; each with a prefix for names."""
    within: set[nn.Module] = set()
    for name, child in module.named_modules():
        if child not in within and isinstance(child, ModelMixin):
            within.update(child.modules())
            yield f"{name}." if name else "", child


def _shareable(
    found: list[tuple[str, nn.Module]], ranks: Ranks, report: Report, is_model: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Those whose clips ranks may share; others are left to the host, every rank with the whole."""
    if ranks.parts and not is_model:
        raise ValueError("swap_in: parts must be False for a pipeline, which calls its models with the whole")
    for path, model in found:
        reason = mesh_models.why_not(model)
        if reason is None:
            yield path, model
        elif ranks.parts:
            raise ValueError(f"swap_in: parts must be False for {type(model).__name__}: {reason}")
        else:
            report.add_left(path.rstrip(".") or type(model).__name__, type(model).__name__, reason)


def _check_frames(model: nn.Module, mask: FrameMask | None) -> None:
    """A mask needs a model whose frames are known, before anything of it changes."""
    if mask is None:
        return
    kind = known_as(host_type(model), registry.GRIDS)
    if isinstance(kind, type):
        return
    if any(isinstance(known_as(host_type(module), registry.FACTORIZED), type) for module in model.modules()):
        return
    why = f": {kind}" if kind else ""
    raise ValueError(f"swap_in: mask must be None for {type(model).__name__}, whose frames are not known{why}")


def _grid_of(model: nn.Module, mask: FrameMask | None) -> Callable[..., Grid] | None:
    kind = known_as(host_type(model), registry.GRIDS)
    return None if mask is None or not isinstance(kind, type) else partial(grid_of, registry.GRIDS[kind])


def _finder(model: nn.Module, path: str, clip: Clip) -> Find:
    """Finds the changes of one model's modules."""
    embeddings = patches.find(model)
    has_grid = isinstance(known_as(host_type(model), registry.GRIDS), type)
    # Attention of a factorized model outside of its temporal parts is within a frame, whoever else has frames.
    around = clip if has_grid or clip.ranks is None else Clip(clip.mask)
    bound = " and ".join(name for name in ("mask", "ranks") if getattr(clip, name) is not None)
    bound = bound.replace("ranks", "mesh")

    def find(name: str, module: nn.Module) -> list[Change] | str | None:
        found: list[Change] | Change | str | None = None
        kind = known_as(type(module), registry.FACTORIZED)
        if kind is not None:
            found = kind if isinstance(kind, str) else registry.FACTORIZED[kind](module, clip)
            if isinstance(found, str) and bound:
                raise ValueError(f"swap_in: {bound} must be None where {path}{name} cannot be served: {found}")
        elif clip.ranks is not None and (layer := mesh_models.change_of_layer(module, clip)) is not None:
            found = layer
            if isinstance(found, str):
                raise ValueError(f"swap_in: mesh must be None where {path}{name} cannot be served: {found}")
        elif known_as(type(module), registry.FORWARDS) is not None:
            found = families.change_of_forward(module)
        elif module in embeddings:
            found = embeddings[module]
        elif hasattr(module, "processor"):
            found = families.change_of_attention(module, name, around)
            if isinstance(found, str) and bound and has_grid and not _is_cross(module):
                raise ValueError(f"swap_in: {bound} must be None where {path}{name} cannot be served: {found}")
        elif _attends(module):
            found = "its attention is written into its forward"
        found = [found] if isinstance(found, Change) else found
        if module is model and clip.ranks is not None and not isinstance(found, str):
            found = mesh_models.changes_of_model(model, clip, found or [])
        return found

    return find


def _is_cross(attn: Any) -> bool:
    """Attention to other tokens than the clip's, which no mask is for."""
    return bool(getattr(attn, "is_cross_attention", False))


def _attends(module: nn.Module) -> bool:
    """A module computes attention itself, without a processor."""
    if list(module.children()) and type(module).__module__.startswith("torch."):
        return False
    return bool({"scaled_dot_product_attention", "softmax"} & names_used(type(module).forward))


def _watch_of(model: nn.Module) -> Watch | None:
    """The hook of a swapped model, which holds what its attention shares."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Watch)), None)
