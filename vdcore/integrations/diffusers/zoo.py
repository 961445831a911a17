"""Every video model of diffusers, tiny, with random weights and inputs: for tests, tables and measurements, offline.

Clips have at least three frames and are wider than high, so that no axis can be taken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from vdcore.rope import axial_rope

T, H, W, L, TEXT = 3, 4, 6, 5, 16  # frames, latent rows and columns, text tokens and channels
B = 2


@dataclass(frozen=True)
class Tiny:
    """One model of diffusers in small.

    Args:
        build: makes the model, its weights as the host draws them.
        inputs: the arguments of its forward, floating ones in float32.
        factorised: attention is spatial and temporal by turns; else over all frames at once.
        gradients: its forward allows them.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    factorised: bool = False
    gradients: bool = True

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model in evaluation mode; weights that the host starts at one number are drawn as well.

        In half precision the host keeps some modules in float32.
        """
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and parameter.min() == parameter.max():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype in (torch.float16, torch.bfloat16):
            wide = getattr(model, "_keep_in_fp32_modules", None) or []
            for module_name, module in model.named_modules():
                if not any(part in module_name.split(".") for part in wide):
                    _cast_own(module, dtype, wide)
        elif dtype != torch.float32:
            model = nn.Module.to(model, dtype)
        return model

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Any]:
        """The inputs, the same numbers in any dtype."""
        torch.manual_seed(seed)

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cast(y) for y in x)
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return {name: cast(x) for name, x in self.inputs().items()}


def _cast_own(module: nn.Module, dtype: torch.dtype, wide: list[str]) -> None:
    """Casts what the module itself holds, without the names that stay in float32."""
    for held in (module._parameters, module._buffers):
        for name, x in held.items():
            if x is not None and x.is_floating_point() and name not in wide:
                x.data = x.data.to(dtype)


def output(result: Any) -> Tensor:
    """The video in what a model returns."""
    return result[0] if isinstance(result, tuple) else result.sample


def _text(channels: int = TEXT, tokens: int = L, batch: int = B) -> Tensor:
    return torch.randn(batch, tokens, channels)


def _video(channels: int = 4, frames: int = T) -> Tensor:
    return torch.randn(B, channels, frames, H, W)


def _timestep() -> Tensor:
    return torch.tensor([7, 301])


def _text_mask() -> Tensor:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, L - 2 :] = 0
    return mask


def _duplicated_rope(dims: tuple[int, int, int], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Tables ``(N, D)`` with every angle twice, as the pipelines of the CogVideoX family make them."""
    rope = axial_rope((T, rows, columns), dims)
    cos, sin = (table.flatten(0, 1).repeat_interleave(2, -1) for table in (rope.cos, rope.sin))
    return cos, sin


# ---- Factorised models ----


def _latte() -> nn.Module:
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


def _animatediff() -> nn.Module:
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


def _svd() -> nn.Module:
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
        "encoder_hidden_states": _text(tokens=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * B),
    }


def _unet3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _i2vgen() -> nn.Module:
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
        "sample": _video(),
        "timestep": torch.tensor(7),
        "fps": torch.tensor([16] * B),
        "image_latents": _video(),
        "image_embeddings": torch.randn(B, TEXT),
        "encoder_hidden_states": _text(),
    }


def _unet_inputs() -> dict[str, Any]:
    return {"sample": _video(), "timestep": torch.tensor(7), "encoder_hidden_states": _text()}


def _animatediff_inputs() -> dict[str, Any]:
    return {**_unet_inputs(), "encoder_hidden_states": _text(batch=B * T)}


# ---- Full 3D models ----


def _allegro() -> nn.Module:
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
        "hidden_states": _video(),
        "encoder_hidden_states": _text(),
        "timestep": _timestep(),
        "attention_mask": torch.ones(B, T, H, W),
        "encoder_attention_mask": _text_mask(),
        "image_rotary_emb": (tuple(tables), positions),
    }


def _mochi() -> nn.Module:
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


def _masked_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _video(),
        "encoder_hidden_states": _text(),
        "timestep": _timestep(),
        "encoder_attention_mask": _text_mask(),
    }


def _mochi_inputs() -> dict[str, Any]:
    return {**_masked_inputs(), "encoder_attention_mask": _text_mask().bool()}


def _cogvideox() -> nn.Module:
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
        "encoder_hidden_states": _text(),
        "timestep": _timestep(),
        "image_rotary_emb": _duplicated_rope((4, 6, 6), H // 2, W // 2),
    }


def _consisid() -> nn.Module:
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


def _easyanimate() -> nn.Module:
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


def _wan(cls: Any = None, **kwargs: Any) -> nn.Module:
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


def _plain_inputs() -> dict[str, Any]:
    return {"hidden_states": _video(), "encoder_hidden_states": _text(), "timestep": _timestep()}


def _wan_i2v() -> nn.Module:
    return _wan(added_kv_proj_dim=24, image_dim=8)


def _wan_i2v_inputs() -> dict[str, Any]:
    return {**_plain_inputs(), "encoder_hidden_states": _text(tokens=512), "encoder_hidden_states_image": _text(8, 4)}


def _helios() -> nn.Module:
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
        **_plain_inputs(),
        "indices_hidden_states": indices(7, T),
        "indices_latents_history_short": indices(5, 2),
        "indices_latents_history_mid": indices(3, 2),
        "indices_latents_history_long": indices(0, 4),
        "latents_history_short": _video(frames=2),
        "latents_history_mid": _video(frames=2),
        "latents_history_long": _video(frames=4),
    }


def _hunyuan() -> nn.Module:
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
    return {**_masked_inputs(), "pooled_projections": torch.randn(B, 8), "guidance": torch.tensor([6.0, 3.0])}


def _hunyuan15() -> nn.Module:
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
        **_masked_inputs(),
        "timestep": _timestep().float(),
        "encoder_hidden_states_2": _text(8, 3),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "image_embeds": _text(8, 2),
    }


def _ltx() -> nn.Module:
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
        **_masked_inputs(),
        "hidden_states": torch.randn(B, T * H * W, 4),
        "num_frames": T,
        "height": H,
        "width": W,
    }


def _ltx2(**kwargs: Any) -> nn.Module:
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


def _ltx2_split() -> nn.Module:
    return _ltx2(rope_type="split", gated_attn=True, audio_gated_attn=True, perturbed_attn=True)


def _ltx2_inputs() -> dict[str, Any]:
    return {
        **_ltx_inputs(),
        "audio_hidden_states": torch.randn(B, 7, 4),
        "audio_encoder_hidden_states": _text(),
        "audio_encoder_attention_mask": _text_mask(),
        "audio_num_frames": 7,
        "fps": 25.0,
    }


def _cosmos() -> nn.Module:
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
    bias = torch.zeros(B, L).masked_fill(~_text_mask().bool(), -torch.inf)
    return {**_plain_inputs(), "attention_mask": bias, "fps": 30}


def _kandinsky() -> nn.Module:
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
        "encoder_hidden_states": _text(),
        "timestep": _timestep().float(),
        "pooled_projections": torch.randn(B, 8),
        "visual_rope_pos": [torch.arange(T), torch.arange(H // 2), torch.arange(W // 2)],
        "text_rope_pos": torch.arange(L),
    }


def _sana() -> nn.Module:
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


def _motif() -> nn.Module:
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


def _skyreels() -> nn.Module:
    return _wan(diffusers.SkyReelsV2Transformer3DModel)


MODELS: dict[str, Tiny] = {
    "Latte": Tiny(_latte, _plain_inputs, factorised=True),
    "AnimateDiff": Tiny(_animatediff, _animatediff_inputs, factorised=True),
    "SVD": Tiny(_svd, _svd_inputs, factorised=True),
    "UNet3D": Tiny(_unet3d, _unet_inputs, factorised=True),
    "I2VGenXL": Tiny(_i2vgen, _i2vgen_inputs, factorised=True),
    "Allegro": Tiny(_allegro, _allegro_inputs),
    "Mochi": Tiny(_mochi, _mochi_inputs),
    "CogVideoX": Tiny(_cogvideox, _cogvideox_inputs),
    "ConsisID": Tiny(_consisid, _consisid_inputs),
    "EasyAnimate": Tiny(_easyanimate, _plain_inputs),
    "Wan": Tiny(_wan, _plain_inputs),
    "Wan I2V": Tiny(_wan_i2v, _wan_i2v_inputs),
    "SkyReelsV2": Tiny(_skyreels, _plain_inputs),
    "Helios": Tiny(_helios, _helios_inputs),
    "HunyuanVideo": Tiny(_hunyuan, _hunyuan_inputs),
    "HunyuanVideo 1.5": Tiny(_hunyuan15, _hunyuan15_inputs),
    "LTX": Tiny(_ltx, _ltx_inputs),
    "LTX2": Tiny(_ltx2, _ltx2_inputs),
    "LTX2.3": Tiny(_ltx2_split, _ltx2_inputs),
    "Cosmos": Tiny(_cosmos, _cosmos_inputs),
    "Kandinsky5": Tiny(_kandinsky, _kandinsky_inputs),
    "SanaVideo": Tiny(_sana, _plain_inputs),
    "MotifVideo": Tiny(_motif, _masked_inputs),
}
