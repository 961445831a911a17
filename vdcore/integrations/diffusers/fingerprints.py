"""Which diffusers this package knows, and how it recognises the code that it was written against.

:data:`FINGERPRINTS` has the functions of diffusers that vdcore replaces, each by the digest of the source that the
replacement was read from. ``tests/integrations/test_diffusers_source.py`` says which are missing or differ with the
installed version.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

try:
    import diffusers
except ImportError as error:  # pragma: no cover
    raise ImportError("vdcore.integrations.diffusers needs diffusers: pip install 'vdcore[models]'") from error

TESTED = ("0.42.1",)


def check_version(version: str | None = None) -> None:
    """Raises a ``RuntimeError`` that names the tested versions if diffusers has another major version."""
    version = diffusers.__version__ if version is None else version
    majors = {known.split(".")[0] for known in TESTED}
    if version.split(".")[0] not in majors:
        raise RuntimeError(
            f"swap_in: diffusers {version} has a major version that vdcore was not tested with; "
            f"tested: {', '.join(TESTED)}"
        )


@lru_cache(maxsize=1024)
def fingerprint(function: Callable[..., Any]) -> str:
    """Twelve hex digits of the source of a host's function: the same source, the same mathematics."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return f"version {diffusers.__version__}"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def unknown_source(*functions: Callable[..., Any]) -> str | None:
    """A reason if one of a host's functions is not the one that its replacement was written against."""
    for function in functions:
        name, found = name_of(function), fingerprint(function)
        if found == FINGERPRINTS.get(name) or found in {f"version {version}" for version in TESTED}:
            continue
        return f"{name} of diffusers {diffusers.__version__} is not the one that vdcore was tested with"
    return None


FINGERPRINTS: dict[str, str] = {
    "diffusers.models.activations.GEGLU.forward": "28ea6dd13c76",
    "diffusers.models.activations.GEGLU.gelu": "553eeddcc433",
    "diffusers.models.activations.GELU.forward": "538b05d6963a",
    "diffusers.models.activations.GELU.gelu": "d203f2720ee0",
    "diffusers.models.attention.BasicTransformerBlock.forward": "440071576ac5",
    "diffusers.models.attention.FeedForward.forward": "dae2c9f53987",
    "diffusers.models.attention.TemporalBasicTransformerBlock.forward": "7eafa694dd59",
    "diffusers.models.attention_processor.AllegroAttnProcessor2_0.__call__": "d22709742596",
    "diffusers.models.attention_processor.AttnProcessor2_0.__call__": "bf23ea5ae404",
    "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0.__call__": "a1ecc57eaf6a",
    "diffusers.models.attention_processor.FusedAttnProcessor2_0.__call__": "dd3113114595",
    "diffusers.models.attention_processor.MochiAttnProcessor2_0.__call__": "56050b08e51d",
    "diffusers.models.embeddings.CogVideoXPatchEmbed.forward": "d4a72413d1a0",
    "diffusers.models.embeddings.MochiAttentionPool.forward": "3d3c616c71ae",
    "diffusers.models.embeddings.MochiAttentionPool.pool_tokens": "4c731c4c43d1",
    "diffusers.models.embeddings.apply_rotary_emb": "a25267d425f8",
    "diffusers.models.embeddings.apply_rotary_emb_allegro": "ba5e4e4f39e0",
    "diffusers.models.normalization.AdaLayerNorm.forward": "89c29c0e0e59",
    "diffusers.models.normalization.AdaLayerNormContinuous.forward": "da3e50ebcd02",
    "diffusers.models.normalization.AdaLayerNormZero.forward": "93374820c014",
    "diffusers.models.normalization.AdaLayerNormZeroSingle.forward": "d48dfb2b1e75",
    "diffusers.models.normalization.CogVideoXLayerNormZero.forward": "8e8e6c80a6b8",
    "diffusers.models.resnet.AlphaBlender.forward": "10849f2751d5",
    "diffusers.models.resnet.SpatioTemporalResBlock.forward": "df3956ccd2b0",
    "diffusers.models.resnet.TemporalResnetBlock.forward": "05a7bbf4a3c8",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock.forward": "f27caf0be5d9",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel.forward": "83cb96cbaa5e",
    "diffusers.models.transformers.consisid_transformer_3d.PerceiverAttention.forward": "9dab6e65cb73",
    "diffusers.models.transformers.consisid_transformer_3d.PerceiverCrossAttention.forward": "1076d0501f8b",
    "diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel.forward": "3af3ffe0c53f",
    "diffusers.models.transformers.transformer_allegro.AllegroTransformerBlock.forward": "0004da078cb6",
    "diffusers.models.transformers.transformer_cosmos.CosmosAdaLayerNorm.forward": "44a661de8745",
    "diffusers.models.transformers.transformer_cosmos.CosmosAdaLayerNormZero.forward": "c518f36caac8",
    "diffusers.models.transformers.transformer_cosmos.CosmosAttnProcessor2_0.__call__": "5ec61c5c7542",
    "diffusers.models.transformers.transformer_cosmos.CosmosRotaryPosEmbed.forward": "ee752d88e85f",
    "diffusers.models.transformers.transformer_easyanimate.EasyAnimateAttnProcessor2_0.__call__": "7331664cbe95",
    "diffusers.models.transformers.transformer_easyanimate.EasyAnimateLayerNormZero.forward": "b33a94cd3501",
    "diffusers.models.transformers.transformer_helios.HeliosAttnProcessor.__call__": "cee6afffceee",
    "diffusers.models.transformers.transformer_helios._get_qkv_projections": "b0cb3c3bd92b",
    "diffusers.models.transformers.transformer_helios.apply_rotary_emb_transposed": "dd8705f3b443",
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0.__call__": "9d2e9a44e1dc",
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoPatchEmbed.forward": "df04ad880922",
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed.forward": "37fb599de310",
    "diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0.__call__": "7bb9b09c8f4a",
    "diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15PatchEmbed.forward": "df04ad880922",
    "diffusers.models.transformers.transformer_hunyuan_video15.HunyuanVideo15RotaryPosEmbed.forward": "cb4af2865638",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5AttnProcessor.__call__": "5cc3419de992",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5OutLayer.forward": "b3783b6e0140",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5RoPE1D.forward": "94d64c1cd6f0",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5RoPE3D.forward": "e1d407ad0a95",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5TransformerDecoderBlock.forward": "c4d4a8ae7e98",
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5TransformerEncoderBlock.forward": "cc9b2bf0800d",
    "diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor.__call__": "cac2aabbea3a",
    "diffusers.models.transformers.transformer_ltx.LTXVideoTransformerBlock.forward": "da45ce5e81f3",
    "diffusers.models.transformers.transformer_ltx.apply_rotary_emb": "fa3a0a3ad5c6",
    "diffusers.models.transformers.transformer_ltx2.LTX2AudioVideoAttnProcessor.__call__": "0391667b7f0a",
    "diffusers.models.transformers.transformer_ltx2.LTX2PerturbedAttnProcessor.__call__": "ab3b88fd4d26",
    "diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformerBlock.forward": "1dbdd9ab731b",
    "diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformerBlock.get_mod_params": "493775244f20",
    "diffusers.models.transformers.transformer_ltx2.apply_interleaved_rotary_emb": "755d35ce4219",
    "diffusers.models.transformers.transformer_ltx2.apply_split_rotary_emb": "101de9c72dfe",
    "diffusers.models.transformers.transformer_mochi.MochiLayerNormContinuous.forward": "e981bdb1beac",
    "diffusers.models.transformers.transformer_mochi.MochiRMSNormZero.forward": "4086229fe17c",
    "diffusers.models.transformers.transformer_motif_video.MotifVideoAttnProcessor2_0.__call__": "896d47392109",
    "diffusers.models.transformers.transformer_motif_video.MotifVideoPatchEmbed.forward": "df04ad880922",
    "diffusers.models.transformers.transformer_motif_video.MotifVideoRotaryPosEmbed.forward": "1683c0ab6523",
    "diffusers.models.transformers.transformer_sana_video.SanaModulatedNorm.forward": "5657081cb148",
    "diffusers.models.transformers.transformer_sana_video.SanaVideoTransformerBlock.forward": "fdaecc8873dd",
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2AttnProcessor.__call__": "be927e58ea7f",
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2RotaryPosEmbed.forward": "863fb1c601f5",
    "diffusers.models.transformers.transformer_skyreels_v2.SkyReelsV2TransformerBlock.forward": "3f34de9e2b0b",
    "diffusers.models.transformers.transformer_skyreels_v2._get_qkv_projections": "6dae2bf5f7fa",
    "diffusers.models.transformers.transformer_temporal.TransformerSpatioTemporalModel.forward": "d8df8cea5b87",
    "diffusers.models.transformers.transformer_temporal.TransformerTemporalModel.forward": "8c42c7d72681",
    "diffusers.models.transformers.transformer_wan.WanAttnProcessor.__call__": "13c09feedcfe",
    "diffusers.models.transformers.transformer_wan.WanRotaryPosEmbed.forward": "863fb1c601f5",
    "diffusers.models.transformers.transformer_wan.WanTransformer3DModel.forward": "9f81a7225288",
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock.forward": "21c15441b009",
    "diffusers.models.transformers.transformer_wan._get_qkv_projections": "657bbdb508a6",
    "diffusers.models.unets.unet_3d_blocks.CrossAttnDownBlockSpatioTemporal.forward": "4ea016b42ee2",
    "diffusers.models.unets.unet_3d_blocks.CrossAttnUpBlockSpatioTemporal.forward": "1b706504e528",
    "diffusers.models.unets.unet_3d_blocks.DownBlockSpatioTemporal.forward": "f2818e581505",
    "diffusers.models.unets.unet_3d_blocks.UNetMidBlockSpatioTemporal.forward": "472ceb34a416",
    "diffusers.models.unets.unet_3d_blocks.UpBlockSpatioTemporal.forward": "3693999add5a",
    "diffusers.models.unets.unet_i2vgen_xl.I2VGenXLTransformerTemporalEncoder.forward": "12b419a47ae7",
    "diffusers.models.unets.unet_motion_model.AnimateDiffTransformer3D.forward": "9e7dfe4385fb",
    "diffusers.models.unets.unet_motion_model.CrossAttnDownBlockMotion.forward": "0770ada0fa01",
    "diffusers.models.unets.unet_motion_model.CrossAttnUpBlockMotion.forward": "f5bc80327599",
    "diffusers.models.unets.unet_motion_model.DownBlockMotion.forward": "1bbea1dda589",
    "diffusers.models.unets.unet_motion_model.UNetMidBlockCrossAttnMotion.forward": "273f29668598",
    "diffusers.models.unets.unet_motion_model.UNetMotionModel.forward": "1ad8262f3a1d",
    "diffusers.models.unets.unet_motion_model.UpBlockMotion.forward": "86e323809604",
    "diffusers.models.unets.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel.forward": "968edca6b909",
}
