"""LTX-2: video and audio, each with attention to itself, to its text, and to one another."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.transformers import transformer_ltx2 as ltx2
from torch import Tensor

from vdcore.integrations.diffusers import registry
from vdcore.integrations.diffusers.attention import as_rope, output_projection
from vdcore.integrations.diffusers.blocks.modulation import (
    GATED,
    NEITHER,
    Parts,
    by_sample_or_token,
    gated_rows,
    modulated_rows,
    parts_of,
)
from vdcore.integrations.diffusers.clip import Clip, samples_agree
from vdcore.integrations.diffusers.families.ltx import LTXAttention
from vdcore.integrations.diffusers.fused import Call
from vdcore.rope import Rope

registry.grid(ltx2.LTX2VideoTransformer3DModel, axes=None)


@registry.processor(ltx2.LTX2AudioVideoAttnProcessor, ltx2.LTX2PerturbedAttnProcessor)
class LTX2Attention(LTXAttention):
    """As LTX, also with halves rotated and outputs gated. Attention between video and audio runs as rebound."""

    RELIES: ClassVar[tuple[Any, ...]] = (ltx2.apply_interleaved_rotary_emb, ltx2.apply_split_rotary_emb)

    @classmethod
    def is_video(cls, name: str) -> bool:
        return "audio" not in name

    def fused(self, attn: Any, call: Call) -> Tensor | None:
        others = any(x is not False for x in call.others.values())  # keys' own rotation, or perturbation
        if call.text is not None or call.mask is not None or others or not self.knows(call.rotary):
            return None
        if call.rotary is not None and attn.rope_type != ("split" if has_halves(call.rotary) else "interleaved"):
            return None
        out = self.self_attention(attn, call.x, call.rotary)
        if attn.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attn.to_gate_logits(call.x))).unsqueeze(-1)
        return output_projection(attn, out)

    def knows(self, tables: tuple[Tensor, Tensor] | None) -> bool:
        if tables is not None and has_halves(tables):
            return all(self.clip.once(samples_agree, x) for x in tables)
        return super().knows(tables)

    def rope(self, rotary: Any, q: Tensor, clip: Clip | None = None) -> Rope | None:
        if rotary is None or not has_halves(rotary):
            return super().rope(rotary, q, clip)
        cos, sin = (x[0].transpose(0, 1) for x in rotary)  # (N, H, D/2)
        return as_rope(cos, sin, q, (clip or self.clip).split(q.shape[1]), style="half")


def has_halves(tables: tuple[Tensor, Tensor]) -> bool:
    """Tables are ``(B, H, N, D/2)``, for halves of a head, and not ``(B, N, H*D)``."""
    return tables[0].ndim == 4


class Side(NamedTuple):
    """Video or audio where they attend to one another.

    Args:
        parts: scale and shift where audio goes to video, then where video goes to audio.
    """

    x: Tensor
    norm: Any
    parts: Parts
    rotary: Any

    def rows(self, to_video: bool) -> Tensor:
        scale, shift = self.parts[:2] if to_video else self.parts[2:]
        return modulated_rows(self.norm, self.x, shift, scale)


@registry.forward(ltx2.LTX2VideoTransformerBlock, serves=GATED, relies=(ltx2.LTX2VideoTransformerBlock.get_mod_params,))
def block(
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
) -> tuple[Tensor, Tensor] | str:
    """Video and audio: each attends to itself and to its text, then to one another."""
    video, audio = hidden_states, audio_hidden_states
    text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
    if not by_sample_or_token(video, temb, temb_ca_scale_shift, temb_ca_gate):
        return NEITHER
    if not by_sample_or_token(audio, temb_audio, temb_ca_audio_scale_shift, temb_ca_audio_gate):
        return NEITHER
    perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
    parts, audio_parts = parts_of(self.scale_shift_table, temb), parts_of(self.audio_scale_shift_table, temb_audio)

    given = {**perturbed, "query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask}
    video = _attend_to_itself(self.norm1, self.attn1, video, parts, given)
    given = {**perturbed, "query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask}
    audio = _attend_to_itself(self.audio_norm1, self.audio_attn1, audio, audio_parts, given)

    if self.cross_attn_adaln:
        text = _modulated_text(self, text, self.prompt_scale_shift_table, temb_prompt)
        audio_text = _modulated_text(self, audio_text, self.audio_prompt_scale_shift_table, temb_prompt_audio)
    of_text = parts[6:9] if self.video_cross_attn_adaln else None
    video = _attend_to_text(self.norm2, self.attn2, video, text, encoder_attention_mask, of_text)
    of_text = audio_parts[6:9] if self.audio_cross_attn_adaln else None
    mask = audio_encoder_attention_mask
    audio = _attend_to_text(self.audio_norm2, self.audio_attn2, audio, audio_text, mask, of_text)

    # Both directions read what video and audio were before either.
    table, audio_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
    of_video, of_audio = parts_of(table[:4], temb_ca_scale_shift), parts_of(audio_table[:4], temb_ca_audio_scale_shift)
    sides = (
        Side(video, self.audio_to_video_norm, of_video, ca_video_rotary_emb),
        Side(audio, self.video_to_audio_norm, of_audio, ca_audio_rotary_emb),
    )
    if use_a2v_cross_attention:
        attended = _attend_to_other(self.audio_to_video_attn, *sides, a2v_cross_attention_mask, to_video=True)
        video = gated_rows(video, attended, *parts_of(table[4:], temb_ca_gate))
    if use_v2a_cross_attention:
        attended = _attend_to_other(self.video_to_audio_attn, *sides[::-1], v2a_cross_attention_mask, to_video=False)
        audio = gated_rows(audio, attended, *parts_of(audio_table[4:], temb_ca_audio_gate))
    video = _feed_forward(self.norm3, self.ff, video, parts)
    return video, _feed_forward(self.audio_norm3, self.audio_ff, audio, audio_parts)


def _attend_to_itself(norm: Any, attn: Any, x: Tensor, parts: Parts, given: dict[str, Any]) -> Tensor:
    rows = modulated_rows(norm, x, parts[0], parts[1])
    return gated_rows(x, attn(hidden_states=rows, encoder_hidden_states=None, **given), parts[2])


def _attend_to_text(norm: Any, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None, parts: Parts | None) -> Tensor:
    """Attention of video or audio to its text, modulated and gated where there are parts."""
    rows = norm(x) if parts is None else modulated_rows(norm, x, parts[0], parts[1])
    attended = attn(rows, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=mask)
    return x + attended if parts is None else gated_rows(x, attended, parts[2])


def _attend_to_other(attn: Any, side: Side, other: Side, mask: Tensor | None, *, to_video: bool) -> Tensor:
    return attn(
        side.rows(to_video),
        encoder_hidden_states=other.rows(to_video),
        query_rotary_emb=side.rotary,
        key_rotary_emb=other.rotary,
        attention_mask=mask,
    )


def _feed_forward(norm: Any, ff: Any, x: Tensor, parts: Parts) -> Tensor:
    return gated_rows(x, ff(modulated_rows(norm, x, parts[3], parts[4])), parts[5])


def _modulated_text(block: Any, text: Tensor, table: Tensor, temb: Tensor | None) -> Tensor:
    """The text, which has no norm before it; without a timestep by the block's table alone."""
    if temb is None:
        shift, scale = table[None, None].to(text.device, text.dtype).unbind(2)
    else:
        shift, scale = block.get_mod_params(table, temb, text.shape[0])
    return text * (1 + scale) + shift
