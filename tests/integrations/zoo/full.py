"""Full 3D models whose text comes by cross attention."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

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
    video,
)


def _allegro() -> Any:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=H,
        sample_width=W,
        sample_frames=T,
        caption_channels=TEXT,
    )


def _allegro_inputs() -> dict[str, Any]:
    rows, columns = H // 2, W // 2
    tables = []
    for size in (T, rows, columns):
        angle = torch.arange(size)[:, None] * 100.0 ** -(torch.arange(0, 8, 2) / 8)
        angle = torch.cat((angle, angle), -1)  # (positions, D/3)
        tables.append((angle.cos(), angle.sin()))
    grid = torch.meshgrid(torch.arange(T), torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = tuple(axis.reshape(1, -1) for axis in grid)
    return {
        "hidden_states": video(),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "attention_mask": torch.ones(B, T, H, W),
        "encoder_attention_mask": text_mask(),
        "image_rotary_emb": (tuple(tables), positions),
    }


def _wan(cls: Any = None, **kwargs: Any) -> Any:
    return (cls or diffusers.WanTransformer3DModel)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **kwargs,
    )


def _wan_i2v() -> Any:
    return _wan(added_kv_proj_dim=24, image_dim=8)


def _wan_i2v_inputs() -> dict[str, Any]:
    return {**plain_inputs(), "encoder_hidden_states": text(tokens=512), "encoder_hidden_states_image": text(8, 4)}


def _helios() -> Any:
    return diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
    )


def _helios_inputs() -> dict[str, Any]:
    def indices(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count)[None].expand(B, -1)

    return {
        **plain_inputs(),
        "indices_hidden_states": indices(7, T),
        "indices_latents_history_short": indices(5, 2),
        "indices_latents_history_mid": indices(3, 2),
        "indices_latents_history_long": indices(0, 4),
        "latents_history_short": video(frames=2),
        "latents_history_mid": video(frames=2),
        "latents_history_long": video(frames=4),
    }


def _ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT,
    )


def _ltx_inputs() -> dict[str, Any]:
    return {
        **masked_inputs(),
        "hidden_states": torch.randn(B, T * H * W, 4),
        "num_frames": T,
        "height": H,
        "width": W,
    }


def _ltx2(**kwargs: Any) -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT,
        rope_double_precision=False,
        **kwargs,
    )


def _ltx2_split() -> Any:
    return _ltx2(rope_type="split", gated_attn=True, audio_gated_attn=True, perturbed_attn=True)


def _ltx2_inputs() -> dict[str, Any]:
    return {
        **_ltx_inputs(),
        "audio_hidden_states": torch.randn(B, 7, 4),
        "audio_encoder_hidden_states": text(),
        "audio_encoder_attention_mask": text_mask(),
        "audio_num_frames": 7,
        "fps": 25.0,
    }


def _cosmos() -> Any:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )


def _cosmos_inputs() -> dict[str, Any]:
    bias = torch.zeros(B, L).masked_fill(~text_mask().bool(), -torch.inf)
    return {**plain_inputs(), "attention_mask": bias, "fps": 30}


def _kandinsky() -> Any:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=8,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )


def _kandinsky_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(B, T, H, W, 4),
        "encoder_hidden_states": text(),
        "timestep": timestep().float(),
        "pooled_projections": torch.randn(B, 8),
        "visual_rope_pos": [torch.arange(T), torch.arange(H // 2), torch.arange(W // 2)],
        "text_rope_pos": torch.arange(L),
    }


def _sana() -> Any:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT,
        sample_size=8,
        rope_max_seq_len=32,
    )


def _skyreels() -> Any:
    return _wan(diffusers.SkyReelsV2Transformer3DModel)


def _skyreels_causal() -> Any:
    model = _skyreels()
    model._set_ar_attention(2)
    return model


def _skyreels_causal_inputs() -> dict[str, Any]:
    return {**plain_inputs(), "hidden_states": video(frames=4)}


FULL: dict[str, Tiny] = {
    "Allegro": Tiny(_allegro, _allegro_inputs),
    "Wan": Tiny(_wan, plain_inputs),
    "Wan I2V": Tiny(_wan_i2v, _wan_i2v_inputs),
    "SkyReelsV2": Tiny(_skyreels, plain_inputs),
    "SkyReelsV2 causal": Tiny(_skyreels_causal, _skyreels_causal_inputs),
    "Helios": Tiny(_helios, _helios_inputs),
    "LTX": Tiny(_ltx, _ltx_inputs),
    "LTX2": Tiny(_ltx2, _ltx2_inputs),
    "LTX2.3": Tiny(_ltx2_split, _ltx2_inputs),
    "Cosmos": Tiny(_cosmos, _cosmos_inputs),
    "Kandinsky5": Tiny(_kandinsky, _kandinsky_inputs),
    "SanaVideo": Tiny(_sana, plain_inputs),
}
