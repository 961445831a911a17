"""AnimateDiff's motion modules, and the temporal transformers of UNet3D and I2VGen-XL.

Both hosts permute ``(B*T, C, H, W)`` to ``(B*H*W, T, C)`` and back around every module. Here hidden states stay
``(B, T, S, C)``, the projections on either side read and write images, and the sinusoidal embedding of the frame is the
shift of the norm before attention.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel, TransformerTemporalModelOutput
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers import _frames, _inference
from vdcore.integrations.diffusers._attention import is_plain
from vdcore.integrations.diffusers._clip import Clip
from vdcore.integrations.diffusers._host import unknown_source
from vdcore.integrations.diffusers._inference import Piece, Stage
from vdcore.integrations.diffusers._rows import add_images_of, normed_rows_of
from vdcore.integrations.diffusers._swap import Change, changed_forward, host_forward


def plan(module: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve a motion module, or why not."""
    reason = unknown_source(type(module).forward) or changed_forward(module)
    if reason is not None:
        return reason
    if type(module.norm) is not nn.GroupNorm:
        return f"its norm is a {type(module.norm).__name__}"
    changes = [Change(module, "blocks in (B, T, S, C)", forward=forward)]
    for block in module.transformer_blocks:
        reason = why_not_block(block)
        if reason is not None:
            return reason
        changes.append(Change(block, "blocks in (B, T, S, C)", forward=block_forward))
        for attn in (block.attn1, block.attn2):
            if attn is not None:
                changes.append(Change.of_processor(attn, _frames.TemporalAttention, clip))
    return changes


def plan_encoder(module: Any, clip: Clip) -> list[Change] | str:
    """The changes that serve the encoder of I2VGen-XL's image latents, which gets rows ``(B*H*W, T, C)``."""
    reason = unknown_source(I2VGenXLTransformerTemporalEncoder.forward) or changed_forward(module)
    reason = reason or _frames.why_not(module.attn1)
    return reason or [Change.of_processor(module.attn1, _frames.FrameSequenceAttention, clip)]


def why_not_block(block: Any) -> str | None:
    """Why a block is not one whose layer norms and self-attention run on ``(B, T, S, C)``."""
    if type(block) is not BasicTransformerBlock:
        return f"its block is a {type(block).__name__}"
    reason = unknown_source(BasicTransformerBlock.forward) or changed_forward(block)
    if reason is not None:
        return reason
    if block.norm_type != "layer_norm":
        return f"its block has the norm {block.norm_type}"
    if block.only_cross_attention or getattr(block, "fuser", None) is not None:
        return "its block attends to something other than the clip"
    if block.pos_embed is not None and type(block.pos_embed) is not SinusoidalPositionalEmbedding:
        return f"its block has a {type(block.pos_embed).__name__}"
    for attn in (block.attn1, block.attn2):
        reason = None if attn is None else _frames.why_not(attn)
        if reason is not None:
            return reason
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
    takes_dict = isinstance(self, TransformerTemporalModel)
    if encoder_hidden_states is not None or cross_attention_kwargs:
        given = (hidden_states, encoder_hidden_states, timestep, class_labels, num_frames, cross_attention_kwargs)
        reason = "temporal attention to a text, or with arguments of its own"
        return host_forward(self, reason, *given, *((return_dict,) if takes_dict else ()))
    x = hidden_states.unflatten(0, (-1, num_frames)).flatten(3)  # (B, T, C, S)
    rows = normed_rows_of(self.proj_in, self.norm, x)  # (B, T, S, E)
    for block in self.transformer_blocks:
        rows = block(rows)
    out = add_images_of(self.proj_out, rows, x).view(hidden_states.shape)
    if not takes_dict:
        return out
    return TransformerTemporalModelOutput(sample=out) if return_dict else (out,)


def block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The block on ``(B, T, S, C)``; sequences ``(N, n, C)`` are the host's."""
    if hidden_states.ndim != 4:
        return host_forward(self, "called by a module in the host's layout", hidden_states, *args, **kwargs)
    x = hidden_states
    count = _inference.tokens_at_once(self, x) if self._chunk_size is None else None
    if count is not None:
        return _without_gradients(self, x, count)
    x = _frames.attend(self.attn1, _embedded_norm(self.norm1, self.pos_embed, x), temporal=True) + x
    if self.attn2 is not None:
        x = _frames.attend(self.attn2, _embedded_norm(self.norm2, self.pos_embed, x), temporal=True) + x
    return feed_forward(self, self.ff, self.norm3(x)) + x


def _without_gradients(block: Any, x: Tensor, count: int) -> Tensor:
    T, tokens = x.shape[1], x.shape[1] * x.shape[2]
    attentions = [attn for attn in (block.attn1, block.attn2) if attn is not None]
    leave = [_inference.Residual(attn.to_out[0], tokens) for attn in attentions]
    feed = _inference.FeedForwardResidual(block.ff, tokens, _inference.Hidden())
    frames = None if block.pos_embed is None else block.pos_embed.pe[0, :T].to(x.dtype)  # (T, C)
    before = [_inference.Norm(norm, shift=frames) for norm in (block.norm1, block.norm2)]
    last_norm = _inference.Norm(block.norm3)

    def first(piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> Tensor:
        return before[0](x, piece)

    def second(piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> Tensor:
        leave[0].write(x, attended, out)
        return before[1](out, piece)

    def last(piece: Piece, x: Tensor, out: Tensor, attended: Tensor | None) -> None:
        leave[-1].write(x if block.attn2 is None else out, attended, out)
        feed.write(out, last_norm(out, piece), out)

    stages: list[Stage] = [first, last] if block.attn2 is None else [first, second, last]
    return _inference.run(x, count, attentions, stages)


def feed_forward(block: Any, ff: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward layer on ``(B, T, S, C)``, in chunks as large as the host's of ``(B*S, T, C)``."""
    if block._chunk_size is None:
        return ff(x)
    B, T, S, _ = x.shape
    tokens = block._chunk_size * (B * S if block._chunk_dim == 1 else T)
    return torch.cat([ff(chunk) for chunk in x.flatten(0, 2).split(tokens)]).view(B, T, S, -1)


def _embedded_norm(norm: Any, embedding: Any, x: Tensor) -> Tensor:
    """``norm(x)`` plus the embedding of the frame."""
    if embedding is None:
        return norm(x)
    if type(norm) is not nn.LayerNorm or not (is_plain(norm) and is_plain(embedding)):
        return _frames.in_rows(lambda rows, text: embedding(rows), norm(x), None, temporal=True)
    frames = embedding.pe[0, : x.shape[1]].to(x.dtype)  # (T, C)
    shift = frames.expand(x.shape[0], -1, -1)
    scale = torch.zeros_like(shift[:, 0])
    return vdcore.modulate(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)
