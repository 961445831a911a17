"""Factorised models: spatial and temporal attention by turns."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo.tiny import TEXT, B, H, T, Tiny, W, plain_inputs, text, video


def _latte() -> Any:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=H,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=T,
    )


def _animatediff() -> Any:
    return diffusers.UNetMotionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
    )


def _svd() -> Any:
    return diffusers.UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=T,
    )


def _svd_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(B, T, 8, H, W),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": text(tokens=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * B),
    }


def _unet3d() -> Any:
    return diffusers.UNet3DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _i2vgen() -> Any:
    return diffusers.I2VGenXLUNet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _i2vgen_inputs() -> dict[str, Any]:
    return {
        "sample": video(),
        "timestep": torch.tensor(7),
        "fps": torch.tensor([16] * B),
        "image_latents": video(),
        "image_embeddings": torch.randn(B, TEXT),
        "encoder_hidden_states": text(),
    }


def _unet_inputs() -> dict[str, Any]:
    return {"sample": video(), "timestep": torch.tensor(7), "encoder_hidden_states": text()}


def _animatediff_inputs() -> dict[str, Any]:
    return {**_unet_inputs(), "encoder_hidden_states": text(batch=B * T)}


FACTORIZED: dict[str, Tiny] = {
    "Latte": Tiny(_latte, plain_inputs, factorized=True),
    "AnimateDiff": Tiny(_animatediff, _animatediff_inputs, factorized=True),
    "SVD": Tiny(_svd, _svd_inputs, factorized=True),
    "UNet3D": Tiny(_unet3d, _unet_inputs, factorized=True),
    "I2VGenXL": Tiny(_i2vgen, _i2vgen_inputs, factorized=True),
}
