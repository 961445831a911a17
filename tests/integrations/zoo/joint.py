"""Full 3D models whose text joins the sequence."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from vdcore.rope import axial_rope
from zoo.tiny import (
    TEXT,
    B,
    H,
    L,
    T,
    Tiny,
    W,
    masked_inputs,
    plain_inputs,
    text,
    text_mask,
    timestep,
)


def _duplicated_rope(dims: tuple[int, int, int], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Tables ``(N, D)`` with every angle twice, as the pipelines of the CogVideoX family make them."""
    rope = axial_rope((T, rows, columns), dims)
    cos, sin = (table.flatten(0, 1).repeat_interleave(2, -1) for table in (rope.cos, rope.sin))
    return cos, sin


def _mochi() -> Any:
    return diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=4,
        max_sequence_length=L,
    )


def _mochi_inputs() -> dict[str, Any]:
    return {**masked_inputs(), "encoder_attention_mask": text_mask().bool()}


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=W,
        sample_height=H,
        sample_frames=9,
        max_text_seq_length=L,
        use_rotary_positional_embeddings=True,
    )


def _cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(B, T, 4, H, W),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "image_rotary_emb": _duplicated_rope((4, 6, 6), H // 2, W // 2),
    }


def _consisid() -> Any:
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=W,
        sample_height=H,
        sample_frames=9,
        max_text_seq_length=L,
        use_rotary_positional_embeddings=True,
        cross_attn_interval=1,
        is_kps=False,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=2,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=5,
    )


def _consisid_inputs() -> dict[str, Any]:
    return {**_cogvideox_inputs(), "id_cond": torch.randn(B, 8), "id_vit_hidden": [torch.randn(B, 2, 8)] * 5}


def _easyanimate() -> Any:
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        mmdit_layers=1,
        sample_width=W,
        sample_height=H,
        patch_size=2,
        add_noise_in_inpaint_model=False,
    )


def _hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )


def _hunyuan_inputs() -> dict[str, Any]:
    return {**masked_inputs(), "pooled_projections": torch.randn(B, 8), "guidance": torch.tensor([6.0, 3.0])}


def _hunyuan15() -> Any:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 6, 8),
        target_size=16,
    )


def _hunyuan15_inputs() -> dict[str, Any]:
    return {
        **masked_inputs(),
        "timestep": timestep().float(),
        "encoder_hidden_states_2": text(8, 3),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "image_embeds": text(8, 2),
    }


def _motif() -> Any:
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_decoder_layers=0,
        patch_size=2,
        text_embed_dim=TEXT,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


JOINT: dict[str, Tiny] = {
    "Mochi": Tiny(_mochi, _mochi_inputs),
    "CogVideoX": Tiny(_cogvideox, _cogvideox_inputs),
    "ConsisID": Tiny(_consisid, _consisid_inputs),
    "EasyAnimate": Tiny(_easyanimate, plain_inputs),
    "HunyuanVideo": Tiny(_hunyuan, _hunyuan_inputs),
    "HunyuanVideo 1.5": Tiny(_hunyuan15, _hunyuan15_inputs),
    "MotifVideo": Tiny(_motif, masked_inputs),
}
