"""The layers of a swapped model that its mask restricts, by number and by name, and the masks that they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.factorized import SpatialAttention
from vdcore.integrations.diffusers.masks import Mask, Masks

Layer = int | str

# The stages of U-Nets in the order of their forward; they register them in another.
_STAGES = ("image_latents_temporal_encoder", "transformer_in", "down_blocks", "mid_block", "up_blocks")


class Attending(NamedTuple):
    """An attention module that a mask may restrict, in the model or, by ``path``, in its pipeline."""

    path: str
    attn: Any
    processor: Any

    @property
    def heads(self) -> int:
        count = getattr(self.attn, "heads", None)
        return self.attn.num_heads if count is None else count


def layers_of(model: nn.Module, clip: Clip, prefix: str = "") -> dict[str, list[Attending]]:
    """Transformer blocks in forward order, by their names, with the attention modules that share a clip.

    Attention of a block to a text is among them: no mask is for it, whatever clip it has.
    """
    found: dict[str, list[Attending]] = {}
    for name, module in sorted(model.named_modules(), key=_stage):
        processor = getattr(module, "processor", None)
        shares = getattr(getattr(processor, "clip", None), "root", None) is clip
        if shares and (not isinstance(processor, SpatialAttention) or processor.TEMPORAL):
            found.setdefault(_block(name), []).append(Attending(prefix + name, module, processor))
    return found


def _stage(entry: tuple[str, nn.Module]) -> int:
    stage = entry[0].partition(".")[0]
    return _STAGES.index(stage) + 1 if stage in _STAGES else 0


def _block(name: str) -> str:
    """The innermost of the numbered modules that a module is in."""
    parts = name.split(".")
    while parts and not parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts) or name


class Model(NamedTuple):
    """A swapped model, with the prefix of its modules' names in a pipeline."""

    prefix: str
    layers: dict[str, list[Attending]]
    clip: Clip


def give_masks(models: Sequence[Model], mask: Masks, dense: Iterable[Layer]) -> None:
    """Gives every layer its mask, or none where it is to stay dense; nothing changes if there is an error.

    Raises:
        ValueError: where a layer is not known, or heads are not those of a mask.
    """
    dense = list(dense)
    by_layer = mask if isinstance(mask, Mapping) else {}
    _check_known(models, dense, "dense_layers")
    _check_known(models, by_layer, "mask")
    chosen: list[tuple[Attending, Mask | None, Clip]] = []
    for model in models:
        for number, (name, attending) in enumerate(model.layers.items()):
            one: Mask | None = None if isinstance(mask, Mapping) else mask
            for layer, of_layer in by_layer.items():
                one = of_layer if _is_named(layer, number, name, model.prefix) else one
            if any(_is_named(layer, number, name, model.prefix) for layer in dense):
                one = None
            for a in attending:
                _check_heads(a, one)
                chosen.append((a, one, model.clip))
    beside: dict[tuple[Clip, Mask | None], Clip] = {}
    for a, one, clip in chosen:
        same = one is clip.given or one == clip.given
        a.processor.clip = clip if same else beside.setdefault((clip, one), Clip(one, of=clip))


def _is_named(layer: Layer, number: int, name: str, prefix: str) -> bool:
    """A layer is a number, or the name of a block or of what it is in; with or without the model's prefix."""
    if isinstance(layer, int):
        return layer == number
    return f"{name}.".startswith(f"{layer}.") or f"{prefix}{name}.".startswith(f"{layer}.")


def _check_known(models: Sequence[Model], layers: Iterable[Layer], argument: str) -> None:
    for layer in layers:
        with_layers = [model for model in models if model.layers]
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"swap_in: {argument} must name layers by number or name, got {layer!r}")
        if isinstance(layer, int):
            known = bool(with_layers) and all(0 <= layer < len(model.layers) for model in with_layers)
        else:
            known = any(_is_named(layer, i, name, m.prefix) for m in models for i, name in enumerate(m.layers))
        if not known:
            names = [f"{i}: {m.prefix}{name}" for m in models for i, name in enumerate(m.layers)]
            raise ValueError(f"swap_in: {argument} must be among {', '.join(names)}, got {layer!r}")


def _check_heads(a: Attending, mask: Mask | None) -> None:
    if not isinstance(mask, tuple):
        return
    total = sum(count for count, _ in mask)
    if total != a.heads:
        raise ValueError(f"swap_in: mask must count the {a.heads} heads of {a.path}, got {total} in {len(mask)} pairs")
