"""Video models of diffusers, small and with random weights, as ``vdcore masks`` and ``measure_masks`` take them.

    PYTHONPATH=examples vdcore masks --model tiny_models:wan

A function returns a model and the arguments of its forward; for a trained one, load it here and make inputs of a real
clip: what random weights attend to says nothing about what trained ones do.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

FRAMES, ROWS, COLUMNS = 8, 12, 20  # of tokens


def wan() -> tuple[Any, dict[str, Any]]:
    """Wan: text by cross-attention."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "timestep": torch.tensor([500]),
    }


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo: a text that joins the sequence, padded; two kinds of blocks."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 12, 12),
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "encoder_attention_mask": torch.tensor([[1] * 11 + [0] * 5]),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500]),
        "guidance": torch.tensor([6000.0]),
    }


def ltx() -> tuple[Any, dict[str, Any]]:
    """LTX-Video: packed tokens, whose grid the call names."""
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=3,
        caption_channels=32,
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, FRAMES * ROWS * COLUMNS, 4),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "encoder_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "timestep": torch.tensor([500]),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
    }
