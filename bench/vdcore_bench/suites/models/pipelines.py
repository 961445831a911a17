"""Pipelines of diffusers at published widths, with few layers and random weights: what denoises, and what decodes.

Widths are those of the configs beside the released weights: Latte-1, AnimateDiff on Stable Diffusion 1.5, SVD-XT,
Wan 2.1 of 1.3B, LTX-Video of 2B. Latents are frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

Size = tuple[int, int, int]  # frames, rows and columns of latents


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's model and autoencoder.

    Args:
        model: makes the denoiser.
        inputs: the arguments of its forward for a size, of one video: with guidance a step calls it for two.
        autoencoder: makes what decodes.
        latents: what the autoencoder's ``decode`` takes for a size.
        layers: how many the model has here, of how many.
        size: of the pipeline's default.
        small: that a small machine can take.
        decoded: of these, what a small machine decodes.
        mask: frames that a frame sees to either side where the step is measured under a mask.
    """

    model: Callable[[], Any]
    inputs: Callable[[int, int, int], dict[str, Any]]
    autoencoder: Callable[[], Any]
    latents: Callable[[int, int, int], dict[str, Any]]
    layers: str
    size: Size
    small: Size
    decoded: Size
    mask: int


def _clip(channels: int) -> Callable[[int, int, int], dict[str, Any]]:
    """Latents ``z`` (1, channels, T, H, W)."""
    return lambda T, H, W: {"z": torch.randn(1, channels, T, H, W)}


def _images(T: int, H: int, W: int) -> dict[str, Any]:
    """Frames as a batch of images."""
    return {"z": torch.randn(T, 4, H, W)}


def _stable_diffusion() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def latte(captions: int = 4096) -> Any:
    """Latte-1 of one pair of blocks.

    Args:
        captions: channels of the text encoder's result.
    """
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=64,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=captions,
        video_length=16,
    )


def _latte_inputs(T: int, H: int, W: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, T, H, W),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 120, 4096),
    }


def _animatediff() -> Any:
    return diffusers.UNetMotionModel(
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=1,
        cross_attention_dim=768,
        num_attention_heads=8,
        motion_num_attention_heads=8,
        motion_max_seq_length=32,
    )


def _animatediff_inputs(T: int, H: int, W: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, T, H, W),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 768).repeat_interleave(T, 0),
    }


def _svd() -> Any:
    return diffusers.UNetSpatioTemporalConditionModel(layers_per_block=1)


def _svd_inputs(T: int, H: int, W: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, T, 8, H, W),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 1, 1024),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }


def _svd_autoencoder() -> Any:
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
    )


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1)


def _wan_inputs(T: int, H: int, W: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, T, H, W),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }


def _ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(num_layers=1)


def _ltx_inputs(T: int, H: int, W: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, T * H * W, 128),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.long),
        "num_frames": T,
        "height": H,
        "width": W,
    }


PIPELINES: dict[str, Pipeline] = {
    "Latte step": Pipeline(
        model=latte,
        inputs=_latte_inputs,
        autoencoder=_stable_diffusion,
        latents=_images,
        layers="1 of 28 pairs of a spatial and a temporal block",
        size=(16, 64, 64),
        small=(16, 24, 24),
        decoded=(1, 24, 24),
        mask=4,
    ),
    "AnimateDiff step": Pipeline(
        model=_animatediff,
        inputs=_animatediff_inputs,
        autoencoder=_stable_diffusion,
        latents=_images,
        layers="1 of 2 layers a level",
        size=(16, 64, 64),
        small=(8, 16, 16),
        decoded=(1, 16, 16),
        mask=2,
    ),
    "SVD step": Pipeline(
        model=_svd,
        inputs=_svd_inputs,
        autoencoder=_svd_autoencoder,
        latents=lambda T, H, W: {**_images(T, H, W), "num_frames": T},
        layers="1 of 2 layers a level",
        size=(25, 72, 128),
        small=(7, 16, 16),
        decoded=(2, 16, 16),
        mask=2,
    ),
    "Wan 1.3B step": Pipeline(
        model=_wan,
        inputs=_wan_inputs,
        autoencoder=lambda: diffusers.AutoencoderKLWan(),
        latents=_clip(16),
        layers="1 of 30 blocks",
        size=(21, 60, 104),
        small=(5, 30, 52),
        decoded=(2, 15, 26),
        mask=1,
    ),
    "LTX step": Pipeline(
        model=_ltx,
        inputs=_ltx_inputs,
        autoencoder=lambda: diffusers.AutoencoderKLLTXVideo(),
        latents=_clip(128),
        layers="1 of 28 blocks",
        size=(16, 22, 38),
        small=(4, 22, 19),
        decoded=(2, 8, 8),
        mask=1,
    ),
}


def decode(autoencoder: Any, given: dict[str, Any]) -> Tensor:
    """The pixels."""
    pixels: Tensor = autoencoder.decode(**given).sample
    return pixels
