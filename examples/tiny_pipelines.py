"""Pipelines of diffusers, tiny and with random weights, as ``vdcore masks`` takes them, and what their calls are given.

    PYTHONPATH=examples vdcore masks --model tiny_pipelines:wan_run

Their videos are noise; what is done with them is what one would do with a pipeline ``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

WIDTH, HEIGHT = 64, 48


def wan() -> Any:
    torch.manual_seed(0)
    return _quiet(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,  # the prompt comes embedded
            transformer=diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=256,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            ),
            vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    )


def wan_inputs(frames: int = 17, steps: int = 3) -> dict[str, Any]:
    return {**_prompt(), **_shared(frames, steps)}


def wan_run() -> tuple[Any, Callable[[], Any]]:
    """The pipeline, and a function that calls it."""
    made = wan()
    return made, lambda: made(**wan_inputs())


def animatediff() -> Any:
    """A Stable Diffusion of two levels with motion modules."""
    torch.manual_seed(0)
    return _quiet(
        diffusers.AnimateDiffPipeline(
            tokenizer=None,
            text_encoder=None,
            motion_adapter=None,  # its modules are in the model already
            unet=diffusers.UNetMotionModel(
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
                cross_attention_dim=32,
                num_attention_heads=2,
                motion_num_attention_heads=2,
                norm_num_groups=4,
            ),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
            ),
            scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        )
    )


def animatediff_inputs(frames: int = 16, steps: int = 3) -> dict[str, Any]:
    return {**_prompt(), **_shared(frames, steps), "decode_chunk_size": 8}


def svd() -> Any:
    """Stable Video Diffusion: from an image, no text."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=224,  # what the pipeline makes of its image
        patch_size=56,
    )
    return _quiet(
        diffusers.StableVideoDiffusionPipeline(
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            feature_extractor=CLIPImageProcessor(),
            unet=diffusers.UNetSpatioTemporalConditionModel(
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                cross_attention_dim=32,
                num_attention_heads=(2, 4),
                addition_time_embed_dim=32,
                projection_class_embeddings_input_dim=96,
                num_frames=8,
            ),
            vae=diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
            ),
            scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        )
    )


def svd_inputs(frames: int = 8, steps: int = 3) -> dict[str, Any]:
    pixels = torch.randint(256, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))
    return {"image": Image.fromarray(pixels.to(torch.uint8).numpy()), **_shared(frames, steps), "decode_chunk_size": 4}


def _quiet(made: Any) -> Any:
    made.set_progress_bar_config(disable=True)
    return made


def _prompt() -> dict[str, Any]:
    """Embeddings of a prompt and of the empty one."""
    prompt, empty = torch.randn(2, 1, 16, 32)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": empty}


def _shared(frames: int, steps: int) -> dict[str, Any]:
    return {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": frames,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
