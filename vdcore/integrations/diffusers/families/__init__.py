"""Which file serves which class of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models import attention_processor as processors
from diffusers.models import transformers
from diffusers.models.transformers import (
    latte_transformer_3d,
    transformer_cosmos,
    transformer_easyanimate,
    transformer_helios,
    transformer_hunyuan_video,
    transformer_hunyuan_video15,
    transformer_kandinsky,
    transformer_ltx,
    transformer_ltx2,
    transformer_motif_video,
    transformer_skyreels_v2,
    transformer_temporal,
    transformer_wan,
)
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from vdcore.integrations.diffusers import (
    _frames,
    _rebound,
    adaln,
    adaln_blocks,
    allegro,
    cogvideox,
    consisid,
    cosmos,
    hunyuan_video,
    kandinsky,
    latte,
    ltx,
    mochi,
    motion,
    svd,
    wan,
)
from vdcore.integrations.diffusers._clip import Clip, Grid
from vdcore.integrations.diffusers._fused import Fused
from vdcore.integrations.diffusers._host import unknown_source
from vdcore.integrations.diffusers._swap import Change, changed_forward, why_not_processor

Plan = Callable[[Any, Clip], "list[Change] | str"]

# Modules that are served as a whole, with all the attention in their temporal blocks.
FACTORISED: dict[type[nn.Module], Plan] = {
    AnimateDiffTransformer3D: motion.plan,
    I2VGenXLTransformerTemporalEncoder: motion.plan_encoder,
    latte_transformer_3d.LatteTransformer3DModel: latte.plan,
    transformer_temporal.TransformerSpatioTemporalModel: svd.plan,
    transformer_temporal.TransformerTemporalModel: motion.plan,
}

# Processors of full-3D models, with the class whose norms and rotations are theirs.
PROCESSORS: dict[type, type[Fused]] = {
    processors.AllegroAttnProcessor2_0: allegro.AllegroAttention,
    processors.CogVideoXAttnProcessor2_0: cogvideox.TextFirstAttention,
    processors.MochiAttnProcessor2_0: mochi.MochiAttention,
    transformer_cosmos.CosmosAttnProcessor2_0: cosmos.CosmosAttention,
    transformer_easyanimate.EasyAnimateAttnProcessor2_0: cogvideox.TextFirstAttention,
    transformer_helios.HeliosAttnProcessor: wan.HeliosAttention,
    transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0: hunyuan_video.JointAttention,
    transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0: hunyuan_video.HunyuanVideo15Attention,
    transformer_kandinsky.Kandinsky5AttnProcessor: kandinsky.KandinskyAttention,
    transformer_ltx.LTXVideoAttnProcessor: ltx.LTXAttention,
    transformer_ltx2.LTX2AudioVideoAttnProcessor: ltx.LTX2Attention,
    transformer_ltx2.LTX2PerturbedAttnProcessor: ltx.LTX2Attention,
    transformer_motif_video.MotifVideoAttnProcessor2_0: hunyuan_video.MotifVideoAttention,
    transformer_skyreels_v2.SkyReelsV2AttnProcessor: wan.SkyReelsAttention,
    transformer_wan.WanAttnProcessor: wan.WanAttention,
}

# Modules with another forward: it, the operators in it, and what else of the host it relies on.
FORWARDS: dict[type[nn.Module], tuple[Any, ...]] = {
    **adaln.HOSTS,
    **adaln_blocks.HOSTS,
    **consisid.HOSTS,
    **mochi.HOSTS,
}


def change_of_forward(module: Any) -> Change | str:
    """What serves a module of :data:`FORWARDS`, or the reason why nothing does."""
    host: Any = type(module)
    forward, serves, *relies = FORWARDS[host]
    reason = unknown_source(host.forward, *relies) or changed_forward(module)
    return reason or Change(module, serves, forward=forward)


def change_of(attn: Any, name: str, clip: Clip) -> Change | str:
    """What serves an attention module outside of factorised blocks, or the reason why nothing does."""
    host: Any = type(attn.processor)
    if host in _frames.HOSTS and _frames.why_not(attn) is None:
        return Change.of_processor(attn, _frames.SpatialAttention, clip)
    base: Any = _rebound.Rebound
    if host in PROCESSORS:
        fused = PROCESSORS[host]
        if not fused.is_video(name):
            clip = Clip(None)
        # From a newer diffusers with other code: its own code runs, with the attention alone served.
        if unknown_source(host.__call__, *fused.RELIES) is None:
            base = fused
    reason = why_not_processor(attn) if base is not _rebound.Rebound else _rebound.why_not(attn)
    return reason or Change.of_processor(attn, _rebound.rebound_class(host, base), clip)


# ---- The grid of tokens, from the arguments of a model's forward ----


def _grid(video: tuple[int, int, int], model: Any) -> Grid:
    """Frames, rows and columns of patches."""
    config = model.config
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    T, H, W = (n // p for n, p in zip(video, patch))
    return T, H, W


def channels_first(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, C, T, H, W)``."""
    return _grid(tuple(hidden_states.shape[2:]), model)  # type: ignore[arg-type]


def frames_first(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, T, C, H, W)``."""
    B, T, C, H, W = hidden_states.shape
    return _grid((T, H, W), model)


def channels_last(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, T, H, W, C)``."""
    return _grid(tuple(hidden_states.shape[1:4]), model)  # type: ignore[arg-type]


def packed(model: Any, *args: Any, **kwargs: Any) -> Grid:
    """Of tokens ``(B, N, C)``, whose grid is named by the call."""
    grid = tuple(kwargs.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(n, int) for n in grid):
        raise ValueError(f"swap_in: num_frames, height and width must be given by name under a mask, got {grid}")
    return grid  # type: ignore[return-value]


# Models whose attention runs over all frames, and which a mask can therefore restrict.
GRIDS: dict[type[nn.Module], Callable[..., Grid]] = {
    transformers.AllegroTransformer3DModel: channels_first,
    transformers.CogVideoXTransformer3DModel: frames_first,
    transformers.ConsisIDTransformer3DModel: frames_first,
    transformers.CosmosTransformer3DModel: channels_first,
    transformers.EasyAnimateTransformer3DModel: channels_first,
    transformers.HunyuanVideoTransformer3DModel: channels_first,
    transformers.HunyuanVideo15Transformer3DModel: channels_first,
    transformers.Kandinsky5Transformer3DModel: channels_last,
    transformers.LTXVideoTransformer3DModel: packed,
    transformers.LTX2VideoTransformer3DModel: packed,
    transformers.MochiTransformer3DModel: channels_first,
    transformers.MotifVideoTransformer3DModel: channels_first,
    transformers.SkyReelsV2Transformer3DModel: channels_first,
    transformers.WanTransformer3DModel: channels_first,
}
