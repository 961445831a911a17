"""Processors of full-3D models whose norms and rotations vdcore takes over with the attention.

A derived class knows the calls that its host's blocks make. Any other call runs as rebound: the host's own code, with
its attention alone served.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from vdcore.integrations.diffusers.attention import (
    as_rope,
    cross,
    output_projection,
    over_clip,
    project,
    project_added,
    qk_norm,
    video,
)
from vdcore.integrations.diffusers.clip import Clip, Keys
from vdcore.integrations.diffusers.observers import OBSERVED, is_observed
from vdcore.integrations.diffusers.rebound import Rebound
from vdcore.integrations.report import note_left
from vdcore.rope import Rope, Style


class Call(NamedTuple):
    """One call of a processor, by what its arguments mean, whatever the host calls them.

    Args:
        x: tokens of the clip ``(B, N, C)``.
        text: ``(B, L, C)``.
        rotary: what the rotation is made from.
        others: by name, those that are not None.
    """

    x: Tensor
    text: Tensor | None
    mask: Tensor | None
    rotary: Any
    others: dict[str, Any]


MEANINGS = {
    "hidden_states": "x",
    "encoder_hidden_states": "text",
    "attention_mask": "mask",
    "image_rotary_emb": "rotary",
    "query_rotary_emb": "rotary",
    "rotary_emb": "rotary",
}


class Fused(Rebound):
    """Base of the processors of full-3D models."""

    # Functions of the host, besides its processor, whose mathematics the class relies on.
    RELIES: ClassVar[tuple[Any, ...]] = ()
    STYLE: ClassVar[Style] = "interleaved"

    @classmethod
    def is_video(cls, name: str) -> bool:
        """Self-attention of the module of this name is over the clip, so that the mask is for it."""
        return True

    def serve(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        served = None
        if is_observed(attn._modules.values()):
            note_left(self, OBSERVED)
        elif self.why_not_now() is None and len(args) <= len(self.NAMES):
            given: dict[str, Any] = {"text": None, "mask": None, "rotary": None}
            others = {}
            for name, value in (*zip(self.NAMES, args), *kwargs.items()):
                if name in MEANINGS:
                    given[MEANINGS[name]] = value
                elif value is not None:
                    others[name] = value
            # Of a text of no tokens the host says what it thinks: some fail.
            if given["text"] is None or given["text"].shape[1] > 0:
                served = self.fused(attn, Call(**given, others=others))
        return self.as_host(attn, *args, **kwargs) if served is None else served

    def fused(self, attn: Any, call: Call) -> Any:
        """The result of one call, or None if it is not one that the class knows."""
        raise NotImplementedError

    def tables(self, rotary: Any, q: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(N, R/2)`` or ``(N, H, R/2)`` from the host's argument, for q ``(B, N, H, D)``."""
        raise NotImplementedError

    def rope(self, rotary: Any, q: Tensor, clip: Clip | None = None) -> Rope | None:
        if rotary is None:
            return None
        cos, sin = self.tables(rotary, q)
        return as_rope(cos, sin, q, (clip or self.clip).split(q.shape[1]), self.STYLE)

    def self_attention(self, attn: Any, x: Tensor, rotary: Any, clip: Clip | None = None) -> Tensor:
        """Attention over the clip ``(B, N, C)``, in heads ``(B, N, H, D)``."""
        q, k, v = project(attn, x)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        return video(clip or self.clip, q, k, v, norm, self.rope(rotary, q, clip))

    def cross_attention(self, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor | None:
        """Attention to a text under a padding mask ``(B, 1, L)``; None if the mask is of another kind."""
        if mask is not None and (not mask.shape[0] == x.shape[0] == text.shape[0] or mask.shape[-1] != text.shape[1]):
            return None
        keys = None if mask is None else self.clip.valid_keys(mask)
        if isinstance(keys, str):
            return None
        q, k, v = project(attn, x, text if keys is None else keys.sort(text))
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        return output_projection(attn, cross(q, k, v, lengths=None if keys is None else keys.lengths, norm=norm))

    def self_or_cross_attention(self, attn: Any, call: Call) -> Tensor | None:
        """Of a host whose self-attention alone rotates, and whose cross attention alone has a mask."""
        if call.text is not None:
            return None if call.rotary is not None else self.cross_attention(attn, call.x, call.text, call.mask)
        return (
            None if call.mask is not None else output_projection(attn, self.self_attention(attn, call.x, call.rotary))
        )

    def joint_attention(
        self,
        attn: Any,
        call: Call,
        *,
        text_first: bool = False,
        text_keys: Keys | None = None,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention over clip and text, neither concatenated to the other; the text's projections may be others.

        Args:
            packed: the text's result is in the order of its keys, valid ones first.
        """
        assert call.text is not None
        text = call.text if text_keys is None else text_keys.sort(call.text)
        q, k, v = project(attn, call.x)
        added = getattr(attn, "add_q_proj", None) is not None
        text_q, text_k, text_v = (project_added if added else project)(attn, text)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        text_q, text_k, text_norm = qk_norm(text_q, text_k, *norms)
        out, out_text = over_clip(
            self.clip,
            q,
            k,
            v,
            text=(text_q, text_k, text_v),
            text_lengths=None if text_keys is None else text_keys.lengths,
            text_norm=text_norm,
            text_first=text_first,
            text_sees=self.clip.text_sees,
            norm=norm,
            rope=self.rope(call.rotary, q),
        )
        to_add_out = getattr(attn, "to_add_out", None)
        if to_add_out is not None:
            out_text = to_add_out(out_text.flatten(2))
        else:
            out_text = out_text.flatten(2) if added else output_projection(attn, out_text)
        if text_keys is not None and not packed:
            out_text = text_keys.unsort(out_text)
        return output_projection(attn, out.flatten(1, 2)), out_text
