"""Blocks of full-3D models that modulate and gate without a module for it, on ``modulate`` and ``gate_residual``."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import (
    transformer_allegro,
    transformer_kandinsky,
    transformer_ltx,
    transformer_ltx2,
    transformer_sana_video,
    transformer_skyreels_v2,
    transformer_wan,
)
from torch import Tensor, nn

from vdcore.integrations.diffusers._modulation import gated, modulated
from vdcore.integrations.diffusers._swap import host_forward

# Parts of a table of modulations: (B, C) by sample, or (B, 1, N, C) by token.
Parts = tuple[Tensor, ...]


def _parts(table: Tensor, temb: Tensor) -> Parts:
    """``table (n, C)`` plus ``temb (B, 1 or N, n C)``, row by row."""
    both = table.to(temb.device) + temb.unflatten(-1, (len(table), -1))  # (B, 1 or N, n, C)
    return (both[:, 0] if temb.shape[1] == 1 else both.unsqueeze(1)).unbind(-2)


def _by_sample_or_token(x: Tensor, *tembs: Tensor) -> bool:
    return x.ndim == 3 and all(temb.ndim == 3 and temb.shape[1] in (1, x.shape[1]) for temb in tembs)


NOT_BY_THESE = "modulation that is by neither sample nor token"


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As :func:`modulated`, of rows ``(B, N, C)``."""
    return modulated(norm, x.unsqueeze(1), shift, scale).squeeze(1)


def _gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """As :func:`gated`, of rows ``(B, N, C)``."""
    return gated(residual.unsqueeze(1), x.unsqueeze(1), gate).squeeze(1)


# ---- LTX, LTX-2 ----


def ltx_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Modulated by ``(B, 1, 6 C)`` or ``(B, N, 6 C)``."""
    if not _by_sample_or_token(hidden_states, temb) or len(self.scale_shift_table) != 6:
        given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask
        return host_forward(self, NOT_BY_THESE, *given)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _parts(self.scale_shift_table, temb)
    attended = self.attn1(
        hidden_states=_modulated(self.norm1, hidden_states, shift, scale),
        encoder_hidden_states=None,
        image_rotary_emb=image_rotary_emb,
    )
    x = _gated(hidden_states, attended, gate)
    x = x + self.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    return _gated(x, self.ff(_modulated(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


def ltx2_block(
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: Any = None,
    audio_rotary_emb: Any = None,
    ca_video_rotary_emb: Any = None,
    ca_audio_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | None = None,
) -> Any:
    """Video and audio: each attends to itself and to its text, then to one another."""
    known = _by_sample_or_token(hidden_states, temb, temb_ca_scale_shift, temb_ca_gate)
    if not known or not _by_sample_or_token(
        audio_hidden_states, temb_audio, temb_ca_audio_scale_shift, temb_ca_audio_gate
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "known")}
        return host_forward(self, NOT_BY_THESE, **given)
    perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
    parts = _parts(self.scale_shift_table, temb)
    audio_parts = _parts(self.audio_scale_shift_table, temb_audio)
    video, audio = hidden_states, audio_hidden_states

    shift, scale, gate = parts[:3]
    rows = _modulated(self.norm1, video, shift, scale)
    given = {"encoder_hidden_states": None, "query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask}
    video = _gated(video, self.attn1(hidden_states=rows, **given, **perturbed), gate)
    shift, scale, gate = audio_parts[:3]
    rows = _modulated(self.audio_norm1, audio, shift, scale)
    given |= {"query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask}
    audio = _gated(audio, self.audio_attn1(hidden_states=rows, **given, **perturbed), gate)

    text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
    if self.cross_attn_adaln:
        text = _modulated_text(self, text, self.prompt_scale_shift_table, temb_prompt)
        audio_text = _modulated_text(self, audio_text, self.audio_prompt_scale_shift_table, temb_prompt_audio)
    of_text = parts[6:9] if self.video_cross_attn_adaln else None
    video = _ltx2_text(self.norm2, self.attn2, video, text, encoder_attention_mask, of_text)
    of_text = audio_parts[6:9] if self.audio_cross_attn_adaln else None
    audio = _ltx2_text(self.audio_norm2, self.audio_attn2, audio, audio_text, audio_encoder_attention_mask, of_text)

    # Both directions read what video and audio were before either.
    table, audio_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
    scale, shift, scale_out, shift_out = _parts(table[:4], temb_ca_scale_shift)
    audio_scale, audio_shift, audio_scale_in, audio_shift_in = _parts(audio_table[:4], temb_ca_audio_scale_shift)
    from_video, from_audio = video, audio
    if use_a2v_cross_attention:
        attended = self.audio_to_video_attn(
            _modulated(self.audio_to_video_norm, from_video, shift, scale),
            encoder_hidden_states=_modulated(self.video_to_audio_norm, from_audio, audio_shift, audio_scale),
            query_rotary_emb=ca_video_rotary_emb,
            key_rotary_emb=ca_audio_rotary_emb,
            attention_mask=a2v_cross_attention_mask,
        )
        (gate,) = _parts(table[4:], temb_ca_gate)
        video = _gated(video, attended, gate)
    if use_v2a_cross_attention:
        attended = self.video_to_audio_attn(
            _modulated(self.video_to_audio_norm, from_audio, audio_shift_in, audio_scale_in),
            encoder_hidden_states=_modulated(self.audio_to_video_norm, from_video, shift_out, scale_out),
            query_rotary_emb=ca_audio_rotary_emb,
            key_rotary_emb=ca_video_rotary_emb,
            attention_mask=v2a_cross_attention_mask,
        )
        (gate,) = _parts(audio_table[4:], temb_ca_audio_gate)
        audio = _gated(audio, attended, gate)

    shift, scale, gate = parts[3:6]
    video = _gated(video, self.ff(_modulated(self.norm3, video, shift, scale)), gate)
    shift, scale, gate = audio_parts[3:6]
    audio = _gated(audio, self.audio_ff(_modulated(self.audio_norm3, audio, shift, scale)), gate)
    return video, audio


def _ltx2_text(norm: Any, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None, parts: Parts | None) -> Tensor:
    """Attention of video or audio to its text, modulated and gated where there are parts."""
    rows = norm(x) if parts is None else _modulated(norm, x, parts[0], parts[1])
    attended = attn(rows, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=mask)
    return x + attended if parts is None else _gated(x, attended, parts[2])


def _modulated_text(block: Any, text: Tensor, table: Tensor, temb: Tensor | None) -> Tensor:
    """The text, which has no norm before it; without a timestep by the block's table alone."""
    if temb is None:
        shift, scale = table[None, None].to(text.device, text.dtype).unbind(2)
    else:
        shift, scale = block.get_mod_params(table, temb, text.shape[0])
    return text * (1 + scale) + shift


# ---- Allegro ----


def allegro_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Tensor:
    """Modulated by ``(B, 6 C)``."""
    assert temb is not None  # the host needs it as well
    x = hidden_states
    if x.ndim != 3:
        given = (encoder_hidden_states, temb, attention_mask, encoder_attention_mask, image_rotary_emb)
        return host_forward(self, "rows of another rank", x, *given)
    parts = self.scale_shift_table + temb.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts.unbind(1)  # (B, C)
    attended = self.attn1(
        _modulated(self.norm1, x, shift, scale),
        encoder_hidden_states=None,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    x = _gated(x, attended, gate)
    if self.attn2 is not None:
        attended = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            image_rotary_emb=None,
        )
        x = attended + x
    return _gated(x, self.ff(_modulated(self.norm2, x, shift_mlp, scale_mlp)), gate_mlp)


# ---- Kandinsky 5 ----


def kandinsky_text_block(self: Any, x: Tensor, time_embed: Tensor, rope: Any) -> Tensor:
    """Modulated by ``(B, C)`` in float32, as the host does."""
    if x.ndim != 3 or time_embed.ndim != 2:
        return host_forward(self, NOT_BY_THESE, x, time_embed, rope)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.text_modulation(time_embed).chunk(6, -1)
    attended = self.self_attention(_modulated(self.self_attention_norm, x, shift, scale), rotary_emb=rope)
    x = _gated(x, attended, gate)
    return _gated(x, self.feed_forward(_modulated(self.feed_forward_norm, x, shift_mlp, scale_mlp)), gate_mlp)


def kandinsky_block(
    self: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Any, sparse_params: Any
) -> Tensor:
    """As the block of the text, with attention to it."""
    x = visual_embed
    if x.ndim != 3 or time_embed.ndim != 2:
        return host_forward(self, NOT_BY_THESE, x, text_embed, time_embed, rope, sparse_params)
    parts = self.visual_modulation(time_embed).chunk(9, -1)
    shift, scale, gate = parts[:3]
    rows = _modulated(self.self_attention_norm, x, shift, scale)
    x = _gated(x, self.self_attention(rows, rotary_emb=rope, sparse_params=sparse_params), gate)
    shift, scale, gate = parts[3:6]
    rows = _modulated(self.cross_attention_norm, x, shift, scale)
    x = _gated(x, self.cross_attention(rows, encoder_hidden_states=text_embed), gate)
    shift, scale, gate = parts[6:]
    return _gated(x, self.feed_forward(_modulated(self.feed_forward_norm, x, shift, scale)), gate)


# ---- SanaVideo ----


def sana_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: Any = None,
) -> Tensor:
    """Modulated by ``(B, 1, 6 C)`` or ``(B, N, 6 C)``."""
    assert timestep is not None and frames is not None and height is not None and width is not None
    x = hidden_states
    if not _by_sample_or_token(x, timestep):
        given = (attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, frames, height, width)
        return host_forward(self, NOT_BY_THESE, x, *given, rotary_emb)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _parts(self.scale_shift_table, timestep)
    x = _gated(x, self.attn1(_modulated(self.norm1, x, shift, scale), rotary_emb=rotary_emb), gate)
    if self.attn2 is not None:
        attended = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        x = attended + x
    rows = _modulated(self.norm2, x, shift_mlp, scale_mlp).unflatten(1, (frames, height, width))
    return _gated(x, self.ff(rows).flatten(1, 3), gate_mlp)


# ---- Wan, SkyReels V2 ----


def wan_block(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    if temb.ndim == 4:  # (B, N, 6, C)
        parts = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    else:  # (B, 6, C)
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _wan_block(self, hidden_states, encoder_hidden_states, None, rotary_emb, parts)


def skyreels_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    if temb.ndim == 4:  # (B, 6, N, C)
        parts = (self.scale_shift_table.unsqueeze(2) + temb.float()).unbind(1)
    else:
        parts = (self.scale_shift_table + temb.float()).unbind(1)
    return _wan_block(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, parts)


def _wan_block(block: Any, x: Tensor, text: Tensor, mask: Tensor | None, rotary_emb: Any, parts: Parts) -> Tensor:
    """The block on rows ``(B, N, C)``, modulated by ``(B, C)`` or ``(B, N, C)``; the host does so in float32."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (y if y.ndim == 2 else y.unsqueeze(1) for y in parts)
    attended = block.attn1(_modulated(block.norm1, x, shift, scale), None, mask, rotary_emb)
    x = _gated(x, attended, gate)
    normed = block.norm2(x.float()).type_as(x)
    x = x + block.attn2(normed, text, None, None)
    return _gated(x, block.ffn(_modulated(block.norm3, x, shift_mlp, scale_mlp)), gate_mlp)


# What serves each class, with which operators, and what else of the host it relies on.
BOTH = "modulate, gate_residual"
HOSTS: dict[type[nn.Module], tuple[Any, ...]] = {
    transformer_allegro.AllegroTransformerBlock: (allegro_block, BOTH),
    transformer_kandinsky.Kandinsky5TransformerDecoderBlock: (kandinsky_block, BOTH),
    transformer_kandinsky.Kandinsky5TransformerEncoderBlock: (kandinsky_text_block, BOTH),
    transformer_ltx.LTXVideoTransformerBlock: (ltx_block, BOTH),
    transformer_ltx2.LTX2VideoTransformerBlock: (
        ltx2_block,
        BOTH,
        transformer_ltx2.LTX2VideoTransformerBlock.get_mod_params,
    ),
    transformer_sana_video.SanaVideoTransformerBlock: (sana_block, BOTH),
    transformer_skyreels_v2.SkyReelsV2TransformerBlock: (skyreels_block, BOTH),
    transformer_wan.WanTransformerBlock: (wan_block, BOTH),
}
