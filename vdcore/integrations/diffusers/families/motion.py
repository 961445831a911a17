"""AnimateDiff's motion modules, and the temporal transformers of UNet3D and I2VGen-XL.

Both hosts permute ``(B*T, C, H, W)`` to ``(B*H*W, T, C)`` and back around every module. Here hidden states stay
``(B, T, S, C)``, the projections on either side read and write images, and the sinusoidal embedding of the frame is the
shift of the norm before attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers import factorized, inference, registry
from vdcore.integrations.diffusers.blocks.images import add_images_of, normed_rows_of
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.fingerprints import unknown_source
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.diffusers.ranks.call import served
from vdcore.integrations.swap import SHARED, Change, changed_forward, host_type, is_of, is_plain
from vdcore.models.layout import switch_layout

SERVES = "blocks in (B, T, S, C)"


@registry.factorized(AnimateDiffTransformer3D, TransformerTemporalModel)
def plan(module: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve a motion module, or why not."""
    reason = unknown_source(host_type(module).forward) or changed_forward(module)
    if reason is not None:
        return reason
    if not is_of(module.norm, nn.GroupNorm):
        return f"its norm is a {type(module.norm).__name__}"
    attention = factorized.TemporalAttention
    changes = (
        factorized.changes_of_block(block, BasicTransformerBlock, block_forward, SERVES, attention, clip, why_not_block)
        for block in module.transformer_blocks
    )
    return factorized.changes_of_module(module, served(forward, clip), SERVES, clip, changes)


@registry.factorized(I2VGenXLTransformerTemporalEncoder)
def plan_encoder(module: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve the encoder of I2VGen-XL's image latents, which gets rows ``(B*H*W, T, C)``."""
    reason = unknown_source(I2VGenXLTransformerTemporalEncoder.forward) or changed_forward(module)
    reason = reason or factorized.why_not(module.attn1)
    return reason or [factorized.TemporalAttention.change(module.attn1, clip)]


def why_not_block(block: Any) -> str | None:
    """Why a block is not one whose layer norms and self-attention run on ``(B, T, S, C)``."""
    if block.norm_type != "layer_norm":
        return f"its block has the norm {block.norm_type}"
    if block.only_cross_attention or getattr(block, "fuser", None) is not None:
        return "its block attends to something other than the clip"
    if block.pos_embed is not None and not is_of(block.pos_embed, SinusoidalPositionalEmbedding):
        return f"its block has a {type(block.pos_embed).__name__}"
    return None


def forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    num_frames: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """The module on ``(B*T, C, H, W)``, for both hosts; ``return_dict`` is UNet3D's."""
    if encoder_hidden_states is not None or cross_attention_kwargs:
        return "temporal attention to a text, or with arguments of its own"
    if is_observed((self.norm, self.proj_in, self.proj_out)):
        return OBSERVED
    x = hidden_states.unflatten(0, (-1, num_frames)).flatten(3)  # (B, T, C, S)
    split = getattr(self, SHARED).shared(num_frames, x.shape[3])
    rows = normed_rows_of(self.proj_in, self.norm, x, split)  # (B, T, S, E)
    rows = switch_layout(rows, "frames", "tokens", split)
    for block in self.transformer_blocks:
        rows = factorized.run_block(
            self, block, partial(block, rows), partial(factorized.in_rows, block, rows, True), temporal=True
        )
    rows = switch_layout(rows, "tokens", "frames", split)
    out = add_images_of(self.proj_out, rows, x).view(hidden_states.shape)
    if not isinstance(self, TransformerTemporalModel):
        return out
    return TransformerTemporalModelOutput(sample=out) if return_dict else (out,)


def block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | str:
    """The block on ``(B, T, S, C)``; sequences ``(N, n, C)`` are the host's."""
    if hidden_states.ndim != 4:
        return factorized.HOSTS_LAYOUT
    x = hidden_states
    count = inference.tokens_at_once(self, x) if self._chunk_size is None else None
    if count is not None:
        return _some_at_a_time(self, x, count)
    for attn, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):
        if attn is not None:
            x = factorized.attend(self, attn, _embedded_norm(norm, self.pos_embed, x), temporal=True) + x
    return factorized.feed_forward(self, self.ff, self.norm3(x)) + x


def _some_at_a_time(block: Any, x: Tensor, count: int) -> Tensor:
    T, tokens = x.shape[1], x.shape[1] * x.shape[2]
    attentions = [attn for attn in (block.attn1, block.attn2) if attn is not None]
    frames = None if block.pos_embed is None else block.pos_embed.pe[0, :T].to(x.dtype)  # (T, C)
    enter = [[inference.Norm(norm, shift=frames)] for norm in (block.norm1, block.norm2)][: len(attentions)]
    leave = [[inference.Residual(attn.to_out[0], tokens)] for attn in attentions]
    feed = inference.FeedForwardResidual(block.ff, tokens, inference.Hidden())
    stages = [inference.Stage(leave=before, enter=after) for before, after in zip([(), *leave], enter)]
    stages.append(inference.Stage(leave[-1], [inference.Norm(block.norm3)], [feed]))
    return inference.run(x, count, attentions, stages)


def _embedded_norm(norm: Any, embedding: Any, x: Tensor) -> Tensor:
    """``norm(x)`` plus the embedding of the frame."""
    if embedding is None:
        return norm(x)
    known = type(norm) is nn.LayerNorm and is_of(embedding, SinusoidalPositionalEmbedding)
    if not (known and is_plain(norm) and is_plain(embedding)):
        return factorized.in_rows(embedding, norm(x), True)
    frames = embedding.pe[0, : x.shape[1]].to(x.dtype)  # (T, C)
    shift = frames.expand(x.shape[0], -1, -1)
    scale = torch.zeros_like(shift[:, 0])
    return vdcore.modulate(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)
