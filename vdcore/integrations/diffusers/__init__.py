"""vdcore in diffusers: one line puts a model on it, one line puts it back.

    from vdcore.integrations.diffusers import swap_in, swap_out

    report = swap_in(pipeline)
    print(report)
    swap_out(pipeline)

Tested with the versions in :data:`TESTED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from vdcore.integrations.diffusers import families, registry
from vdcore.integrations.diffusers.blocks import patches
from vdcore.integrations.diffusers.clip import Clip, Grid, Settings, Watch, checkpoint_as_host, watch_of
from vdcore.integrations.diffusers.fingerprints import TESTED, check_version
from vdcore.integrations.diffusers.layers import Layer, Model, give_masks, layers_of
from vdcore.integrations.diffusers.masks import Masks, check_mask, mask_text
from vdcore.integrations.diffusers.pipeline import models_of
from vdcore.integrations.diffusers.ranks import models as mesh_models
from vdcore.integrations.diffusers.ranks.mesh import ranks_of
from vdcore.integrations.diffusers.registry import grid_of
from vdcore.integrations.diffusers.switch import count_steps, dense, forget_steps
from vdcore.integrations.report import Entry, Report
from vdcore.integrations.swap import Change, Find, host_type, known_as, names_used, swap
from vdcore.integrations.swap import swap_out as swap_module_out
from vdcore.mask import FrameMask

__all__ = ["TESTED", "Entry", "Report", "swap_in", "swap_out"]


def swap_in(
    model_or_pipeline: Any,
    mask: Masks | None = None,
    dense_layers: Iterable[Layer] = (),
    dense_steps: int = 0,
    mesh: Any = None,
    *,
    parts: bool = False,
    plan: str | None = None,
) -> Report:
    """Puts the attention of a video model, and what vdcore fuses around it, on vdcore.

    Only the modules of this model change, and only their processor or class: parameters, hooks and other models stay as
    they are. Calls that vdcore cannot serve exactly are left to diffusers; the report says which and why. Swapping
    again is the same as once.

    Args:
        model_or_pipeline: a diffusers model, or a pipeline, whose models are swapped; its autoencoders are not.
        mask: what a frame, or a token, sees in temporal and in full 3D attention, training-free; None: as trained,
            exact. Under a causal mask text does not attend to video. A tuple of pairs ``(heads, mask)`` gives groups of
            heads masks of their own. A dict gives layers theirs, by number or name; those that it does not name see
            everything. A :class:`GridMask` is for full 3D attention: the grid comes from each call of the model.
        dense_layers: transformer blocks that see everything, by number in forward order or by name.
        dense_steps: of a pipeline: steps of its scheduler, from each ``set_timesteps``, in which all layers see
            everything. For a model, ``with report.dense():`` does it.
        mesh: processes that share the frames of every clip: a ``DeviceMesh`` of one dimension, or diffusers'
            ``ContextParallelConfig``, of which the processes count. Every rank passes the whole clip and gets the
            whole result, and gradients of inputs are whole as well; those of parameters are such that their mean over
            the mesh, what DDP and FSDP2 take, is the gradient of one process. For Latte, SVD, AnimateDiff, Wan and
            CogVideoX; of others the report says that they are left, whole on every rank. Masks are FrameMasks then.
        parts: on a mesh each rank passes and gets its own frames (:func:`vdcore.parallel.shard`), and what else has
            frames alike. The loss is the sum of the ranks' losses then, gradients of inputs the rank's share.
        plan: how attention over all frames is shared out, ``"heads"``, ``"ring"`` or ``"halo"``; None: what sends the
            least bytes (:func:`vdcore.parallel.explain`).

    Raises:
        TypeError: if there is no model in it, or the mask or the mesh is none.
        ValueError: if a mask is given and a model's frames are not known, if a layer is not known, if heads do not add
            up, or for dense_steps of a model; a mesh of several dimensions, or with a mask in rows and columns or of
            some heads; parts of a pipeline, or of a model that is not served under a mesh.
        RuntimeError: if this version of diffusers was not tested.
    """
    check_version()
    check_mask(mask)
    ranks = ranks_of(mesh, plan, parts)
    if ranks is not None:
        mesh_models.check_mask(mask)
    settings = Settings(mask, tuple(dense_layers), _checked_steps(model_or_pipeline, dense_steps), ranks)
    if mask is None and (settings.dense_layers or dense_steps):
        name, value = ("dense_layers", settings.dense_layers) if settings.dense_layers else ("dense_steps", dense_steps)
        raise ValueError(f"swap_in: {name} must come with a mask, without which all is dense, got {value!r}")
    report = Report()
    found = list(models_of(model_or_pipeline, report, "swap_in"))
    if ranks is not None:
        found = list(mesh_models.shareable(found, ranks, report, isinstance(model_or_pipeline, nn.Module)))
    for _, model in found:
        _check_frames(model, mask)
    swapped = {m: w for _, m in found if (w := watch_of(m)) is not None}
    before = {m: w for m, w in swapped.items() if w.settings != settings or not (w.has_all(m) and w.in_places(m))}
    steps = count_steps(model_or_pipeline, dense_steps) if dense_steps else None
    fresh = [model for _, model in found if model in before or model not in swapped]
    for model in fresh:
        swap_out(model)  # parts of it may have been swapped on their own, without its mask
    try:
        watches = _swap(found, settings, report, {model: _new_watch(model, settings) for model in fresh})
    except BaseException:
        for model in fresh:
            swap_out(model)
        for model, watch in before.items():
            _swap([("", model)], watch.settings, Report(), {model: watch})
        raise
    for watch in watches:
        watch.clip.switch.steps = steps
    report.dense_inside = partial(dense, [watch.clip.switch for watch in watches])
    return report


def _new_watch(model: nn.Module, settings: Settings) -> Watch:
    mask, ranks = settings.mask, settings.ranks
    return Watch(Clip(mask, ranks=ranks), _grid_of(model, mask) if ranks is None else None, settings)


def _checked_steps(model_or_pipeline: Any, dense_steps: int) -> int:
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int):
        raise TypeError(f"swap_in: dense_steps must be an int, got {dense_steps!r}")
    if dense_steps < 0:
        raise ValueError(f"swap_in: dense_steps must be at least 0, got {dense_steps}")
    if dense_steps and isinstance(model_or_pipeline, nn.Module):
        raise ValueError(
            f"swap_in: dense_steps must be 0 for a model, whose steps nobody counts: call it inside of "
            f"`with report.dense():` in its first steps, got {dense_steps}"
        )
    return dense_steps


def _swap(
    found: Sequence[tuple[str, nn.Module]], settings: Settings, report: Report, fresh: Mapping[nn.Module, Watch]
) -> list[Watch]:
    """Swaps models in, all or none of them.

    Args:
        fresh: what those hold that are not swapped yet.
    """
    watches = [watch_of(model) or fresh[model] for _, model in found]
    for (_, model), watch in zip(found, watches):
        watch.go_last(model)
    models = [(path, model, _finder(model, path, watch.clip)) for (path, model), watch in zip(found, watches)]
    swap(models, report, [Change.of_hook(model, watch) for model, watch in fresh.items()], stacklevel=4)
    if settings.mask is not None:
        layers = [Model(path, layers_of(m, w.clip, path), w.clip) for (path, m), w in zip(found, watches)]
        give_masks(layers, settings.mask, settings.dense_layers)
    for (_, model), watch in zip(found, watches):
        watch.attending = watch.count(model)
    return watches


def swap_out(model_or_pipeline: Any) -> None:
    """Undoes :func:`swap_in`, bit for bit. A model that was never swapped stays as it is."""
    for _, model in models_of(model_or_pipeline, Report(), "swap_out"):
        swap_module_out(model)
        checkpoint_as_host(model)
    if not isinstance(model_or_pipeline, nn.Module):
        forget_steps(model_or_pipeline)


# ---- What is to be changed ----


def _check_frames(model: nn.Module, mask: Masks | None) -> None:
    """A mask needs a model whose frames are known, before anything of it changes."""
    if mask is None:
        return
    kind = known_as(host_type(model), registry.GRIDS)
    if isinstance(kind, type):
        return
    if any(isinstance(known_as(host_type(module), registry.FACTORIZED), type) for module in model.modules()):
        if isinstance(mask, FrameMask):
            return
        raise ValueError(
            f"swap_in: mask must be one FrameMask or None for {type(model).__name__}, whose attention across frames is "
            f"at one position and knows no grid, got {mask_text(mask)}"
        )
    why = f": {kind}" if kind else ""
    raise ValueError(f"swap_in: mask must be None for {type(model).__name__}, whose frames are not known{why}")


def _grid_of(model: nn.Module, mask: Masks | None) -> Callable[..., Grid] | None:
    kind = known_as(host_type(model), registry.GRIDS)
    return None if mask is None or not isinstance(kind, type) else partial(grid_of, registry.GRIDS[kind])


def _finder(model: nn.Module, path: str, clip: Clip) -> Find:
    """Finds the changes of one model's modules."""
    embeddings = patches.find(model)
    has_grid = isinstance(known_as(host_type(model), registry.GRIDS), type)
    # Attention of a factorized model outside of its temporal parts is within a frame, whoever else has frames.
    around = clip if has_grid or clip.ranks is None else Clip(clip.given, beside=clip)
    bound = " and ".join(name for name, x in (("mask", clip.given), ("mesh", clip.ranks)) if x is not None)

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
