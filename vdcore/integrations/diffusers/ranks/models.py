"""Which models a mesh may share the clips of, what mixes frames in them, and where their arguments have frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models import embeddings, resnet
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel, WanTransformerBlock
from diffusers.models.unets import unet_3d_blocks, unet_motion_model
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from vdcore.integrations.diffusers.clip import Clip, may_look, pairs_agree
from vdcore.integrations.diffusers.families import latte
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.masks import Masks, mask_text
from vdcore.integrations.diffusers.ranks import layers
from vdcore.integrations.diffusers.ranks.call import Cut, Frames, OnRanks, Served
from vdcore.integrations.diffusers.ranks.mesh import Ranks
from vdcore.integrations.report import Report
from vdcore.integrations.swap import Change, changed_forward, host_type, known_as
from vdcore.mask import FrameMask

SERVES = "clips shared by ranks"


@dataclass(frozen=True)
class Family:
    """How one model is served.

    Args:
        frames: where its arguments have frames.
        relies: functions of the host that were looked through for what mixes frames or counts them.
        inner: its forward on a rank's frames; None: the host's.
        why_not: why one such model is not served.
    """

    frames: Frames
    relies: tuple[Callable[..., Any], ...]
    inner: Callable[..., Any] | None = None
    why_not: Callable[[Any], str | None] = lambda model: None


# ---- Arguments with frames besides the clip ----


def _none(model: Any, T: int, given: dict[str, Any], cut: Cut) -> dict[str, Any]:
    return {}


def _of_wan(model: Any, T: int, given: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Timesteps ``(B, N)``, one for each token."""
    timestep = given["timestep"]
    return {"timestep": cut(timestep, 1, timestep.shape[1] // T)} if timestep.ndim == 2 else {}


def _of_cogvideox(model: Any, T: int, given: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Rotary tables ``(N, D)``."""
    tables = given.get("image_rotary_emb")
    return {} if tables is None else {"image_rotary_emb": tuple(cut(x, 0, x.shape[0] // T) for x in tables)}


def _check_cogvideox(model: Any, given: dict[str, Any]) -> None:
    """Its blocks may be compiled, where no value is looked at."""
    if not all(may_look(x) and pairs_agree(x) for x in given.get("image_rotary_emb") or ()):
        raise ValueError("swap_in: image_rotary_emb must have every angle twice on a mesh, for neighboring channels")


_ANIMATEDIFF = ("encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual")


def _of_animatediff(model: Any, T: int, given: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Texts ``(B T, L, C)``, and what a ControlNet adds, ``(B T, C, H, W)``."""

    def own(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return tuple(own(y) for y in x)
        return cut(x.unflatten(0, (-1, T)), 1, 1).flatten(0, 1)

    return {name: own(given[name]) for name in _ANIMATEDIFF if given.get(name) is not None}


def _one(model: Any) -> int:
    return 1


def _patch_of_wan(model: Any) -> int:
    return model.config.patch_size[0]


def _patch_of_cogvideox(model: Any) -> int:
    return model.config.patch_size_t or 1


def _why_not_cogvideox(model: Any) -> str | None:
    patches = model.patch_embed
    counted = patches.use_positional_embeddings or patches.use_learned_positional_embeddings
    if counted and patches.patch_size_t is not None:
        return "positions that are added to tokens of several frames"
    return None


# ---- Models ----

_MOTION = [
    getattr(unet_motion_model, name).forward
    for name in ("DownBlockMotion", "CrossAttnDownBlockMotion", "UpBlockMotion", "CrossAttnUpBlockMotion")
]
_SPATIO_TEMPORAL = [
    getattr(unet_3d_blocks, f"{name}SpatioTemporal").forward
    for name in ("DownBlock", "CrossAttnDownBlock", "UNetMidBlock", "UpBlock", "CrossAttnUpBlock")
]

FAMILIES: dict[type[nn.Module], Family] = {
    LatteTransformer3DModel: Family(
        Frames("hidden_states", 2, _one, _none), (LatteTransformer3DModel.forward,), latte.forward
    ),
    WanTransformer3DModel: Family(
        Frames("hidden_states", 2, _patch_of_wan, _of_wan, (("timestep", 1),)),
        (WanTransformer3DModel.forward, WanTransformerBlock.forward),
    ),
    CogVideoXTransformer3DModel: Family(
        Frames("hidden_states", 1, _patch_of_cogvideox, _of_cogvideox, check=_check_cogvideox),
        (CogVideoXTransformer3DModel.forward, CogVideoXBlock.forward),
        why_not=_why_not_cogvideox,
    ),
    UNetMotionModel: Family(
        Frames("sample", 2, _one, _of_animatediff, tuple((name, 0) for name in _ANIMATEDIFF)),
        (UNetMotionModel.forward, unet_motion_model.UNetMidBlockCrossAttnMotion.forward, *_MOTION),
    ),
    UNetSpatioTemporalConditionModel: Family(
        Frames("sample", 1, _one, _none),
        (UNetSpatioTemporalConditionModel.forward, resnet.SpatioTemporalResBlock.forward, *_SPATIO_TEMPORAL),
    ),
}

# Parts of them that count frames, or mix them otherwise than by attention.
LAYERS: dict[type[nn.Module], Callable[..., Any]] = {
    WanRotaryPosEmbed: layers.wan_rope,
    embeddings.CogVideoXPatchEmbed: layers.cogvideox_patches,
    resnet.TemporalResnetBlock: layers.temporal_resnet,
}


def check_mask(mask: Masks | None) -> None:
    """Ranks exchange frames: a mask that is not in frames alone, or not of all heads, is not served yet."""
    for one in mask.values() if isinstance(mask, Mapping) else (mask,):
        if one is not None and not isinstance(one, FrameMask):
            raise ValueError(f"swap_in: mask must be a FrameMask, or a dict of these, on a mesh, got {mask_text(one)}")


def shareable(
    found: Iterable[tuple[str, nn.Module]], ranks: Ranks, report: Report, is_model: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Models whose clips ranks may share; others are left to the host, every rank with the whole."""
    if ranks.parts and not is_model:
        raise ValueError("swap_in: parts must be False for a pipeline, which calls its models with the whole")
    for path, model in found:
        reason = why_not(model)
        if reason is None:
            yield path, model
        elif ranks.parts:
            raise ValueError(f"swap_in: parts must be False for {type(model).__name__}: {reason}")
        else:
            report.add_left(path.rstrip(".") or type(model).__name__, type(model).__name__, reason)


NOT_YET = "not served under a mesh yet: what mixes frames in it has not been looked through"


def why_not(model: Any) -> str | None:
    """Why the clips of a model are not shared by ranks."""
    kind = known_as(host_type(model), FAMILIES)
    if not isinstance(kind, type):
        return NOT_YET if kind is None else f"not served under a mesh yet: {kind}"
    if getattr(model, "_parallel_config", None) is not None:
        return "diffusers' own parallelism is on"
    family = FAMILIES[kind]
    return unknown_source(*family.relies) or changed_forward(model) or family.why_not(model)


def changes_of_model(model: Any, clip: Clip, found: list[Change]) -> list[Change]:
    """A model's changes with those of a mesh; ``found``: without, the model's own first."""
    kind: Any = known_as(host_type(model), FAMILIES)
    family = FAMILIES[kind]
    return [Change.of_forward(model, OnRanks(family.frames, family.inner), SERVES, clip), *found[1:]]


def change_of_layer(module: Any, clip: Clip) -> Change | str | None:
    """What serves a part of a model that counts or mixes frames; None: it is none."""
    kind = known_as(type(module), LAYERS)
    if kind is None or isinstance(kind, str):
        return kind
    host: Any = kind
    reason = unknown_source(host.forward) or changed_forward(module)
    return reason or Change.of_forward(module, Served(LAYERS[host]), SERVES, clip)
