"""One block of Latte, AnimateDiff, SVD and Wan at its real width, with what the host does around it.

Temporal blocks are measured with the permutes that lead into and out of them, which in Latte the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from vdcore_bench.suites.models.pipelines import latte


@dataclass(frozen=True)
class Block:
    """A block of a host.

    Args:
        build: makes the module to swap.
        inputs: draws its input for a number of frames, rows and columns of tokens.
        host, ours: call the module before and after the swap, with the same input.
        size: frames, rows and columns: of the model's own default, and of one that a small machine can take.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Any]
    host: Callable[[Any, Any], Tensor]
    ours: Callable[[Any, Any], Tensor]
    size: tuple[int, int, int]
    small: tuple[int, int, int]


def _latte_inputs(T: int, H: int, W: int) -> Any:
    return T, torch.randn(T, H * W, 1152), torch.randn(1, 6 * 1152)  # (B*T, S, C)


def _latte_host(model: Any, given: Any) -> Tensor:
    T, x, steps = given
    block: BasicTransformerBlock = model.temporal_transformer_blocks[0]
    S, C = x.shape[1:]
    rows = x.reshape(-1, T, S, C).permute(0, 2, 1, 3).reshape(-1, T, C)
    repeated = steps.repeat_interleave(S, dim=0).view(-1, steps.shape[-1])
    rows = block(rows, None, None, None, repeated, None, None)
    return rows.reshape(-1, S, T, C).permute(0, 2, 1, 3).reshape(-1, S, C)


def _latte_ours(model: Any, given: Any) -> Tensor:
    T, x, steps = given
    block = model.temporal_transformer_blocks[0]
    return block(x.unflatten(0, (-1, T)), None, None, None, steps, None, None).flatten(0, 1)


def _animatediff() -> Any:
    return AnimateDiffTransformer3D(
        num_attention_heads=8,
        attention_head_dim=40,
        in_channels=320,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=32,
    )


def _images(T: int, H: int, W: int) -> Any:
    return T, torch.randn(T, 320, H, W)


def _motion(module: Any, given: Any) -> Tensor:
    T, x = given
    return module(x, num_frames=T)


def _svd() -> Any:
    return TransformerSpatioTemporalModel(5, 64, in_channels=320, num_layers=1, cross_attention_dim=1024)


def _svd_inputs(T: int, H: int, W: int) -> Any:
    return T, torch.randn(T, H * W, 320), torch.randn(1, 1, 1024)


def _svd_host(module: Any, given: Any) -> Tensor:
    T, x, text = given
    S = x.shape[1]
    context = text[:, None].broadcast_to(1, S, *text.shape[1:]).reshape(S, -1, text.shape[-1])
    return module.temporal_transformer_blocks[0](x, num_frames=T, encoder_hidden_states=context)


def _svd_ours(module: Any, given: Any) -> Tensor:
    T, x, text = given
    block = module.temporal_transformer_blocks[0]
    return block(x.unflatten(0, (-1, T)), num_frames=T, encoder_hidden_states=text).flatten(0, 1)


def _wan() -> Any:
    return WanTransformerBlock(1536, 8960, 12, cross_attn_norm=True)


def _wan_inputs(T: int, H: int, W: int) -> Any:
    rope = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, T, 2 * H, 2 * W))
    return torch.randn(1, T * H * W, 1536), torch.randn(1, 512, 1536), torch.randn(1, 6, 1536), rope


def _wan_call(block: Any, given: Any) -> Tensor:
    return block(*given)


BLOCKS: dict[str, Block] = {
    "Latte temporal block": Block(
        partial(latte, captions=8), _latte_inputs, _latte_host, _latte_ours, (16, 32, 32), (16, 16, 16)
    ),
    "AnimateDiff motion module": Block(_animatediff, _images, _motion, _motion, (16, 64, 64), (16, 32, 32)),
    "SVD temporal block": Block(_svd, _svd_inputs, _svd_host, _svd_ours, (14, 72, 128), (14, 32, 32)),
    "Wan 1.3B block": Block(_wan, _wan_inputs, _wan_call, _wan_call, (21, 30, 52), (3, 15, 26)),
}
