"""Processors of full-3D models whose norms and rotations vdcore takes over with the attention.

A derived class knows the calls that its host's blocks make. Any other call runs as rebound: the host's own code, with
its attention alone served.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vdcore.integrations.diffusers.attention import (
    as_rope,
    cross,
    joint,
    output_projection,
    project,
    project_added,
    qk_norm,
    video,
)
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.diffusers.rebound import Rebound
from vdcore.rope import Rope, Style


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
        served = self.fused(attn, *args, **kwargs) if self.why_not_now() is None else None
        return self.as_host(attn, *args, **kwargs) if served is None else served

    def fused(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """One call with the arguments of the host's processor; None if it is not one that the class knows."""
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
        if mask is not None and (mask.shape[0] != x.shape[0] or mask.shape[-1] != text.shape[1]):
            return None
        lengths = None if mask is None else self.clip.key_lengths(mask)
        if isinstance(lengths, str):
            return None
        q, k, v = project(attn, x, text)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        return output_projection(attn, cross(q, k, v, lengths=lengths, norm=norm))

    def self_or_cross_attention(
        self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any
    ) -> Tensor | None:
        """Of a host whose self-attention alone rotates, and whose cross attention alone has a mask."""
        if text is None:
            return None if mask is not None else output_projection(attn, self.self_attention(attn, x, rotary))
        return None if rotary is not None else self.cross_attention(attn, x, text, mask)

    def joint_attention(
        self,
        attn: Any,
        x: Tensor,
        text: Tensor,
        rotary: Any,
        *,
        text_first: bool = False,
        text_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the clip ``(B, N, C)`` and the text ``(B, L, C)``, whose projections may be others."""
        q, k, v = project(attn, x)
        added = getattr(attn, "add_q_proj", None) is not None
        text_q, text_k, text_v = (project_added if added else project)(attn, text)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        text_q, text_k, text_norm = qk_norm(text_q, text_k, *norms)
        out, out_text = joint(
            self.clip,
            q,
            k,
            v,
            (text_q, text_k, text_v),
            norm=norm,
            text_norm=text_norm,
            rope=self.rope(rotary, q),
            text_lengths=text_lengths,
            text_first=text_first,
        )
        to_add_out = getattr(attn, "to_add_out", None)
        if to_add_out is not None:
            out_text = to_add_out(out_text.flatten(2))
        else:
            out_text = out_text.flatten(2) if added else output_projection(attn, out_text)
        return output_projection(attn, out), out_text

    def text_lengths(self, mask: Tensor | None, tokens: int, text: int) -> Tensor | str | None:
        """Valid text tokens of a mask over clip and text, text last; the reason if the mask is of another kind."""
        if mask is None:
            return None
        if mask.shape[-1] != tokens + text:
            return "the attention mask is not one of the clip and the text"
        lengths = self.clip.key_lengths(mask)
        return lengths - tokens if isinstance(lengths, Tensor) else lengths
