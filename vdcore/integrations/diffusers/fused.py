"""Processors of full-3D models whose norms and rotations vdcore takes over with the attention.

A derived class knows the calls that its host's blocks make. Any other call runs as rebound: the host's own code, with
its attention alone served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from vdcore.integrations.diffusers._attention import (
    cross,
    joint,
    leave_projection,
    project,
    project_added,
    qk_norm,
    video,
)
from vdcore.integrations.diffusers._rebound import Rebound
from vdcore.rope import Rope


class Fused(Rebound):
    """Base of the processors of full-3D models."""

    # Functions of the host, besides its processor, whose mathematics the class relies on.
    RELIES: ClassVar[tuple[Any, ...]] = ()

    @classmethod
    def is_video(cls, name: str) -> bool:
        """Self-attention of the module of this name is over the clip, so that the mask is for it."""
        return True

    def self_attention(self, attn: Any, x: Tensor, rope: Callable[[Tensor], Rope | None], **kwargs: Any) -> Tensor:
        """Attention over the clip ``(B, N, C)``, in heads ``(B, N, H, D)``; ``rope`` makes the table for q."""
        q, k, v = project(attn, x)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k, **kwargs)
        return video(self.clip, q, k, v, norm, rope(q))

    def cross_attention(self, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor | None:
        """Attention to a text under a padding mask ``(B, 1, L)``; None if the mask is of another kind."""
        lengths = None
        if mask is not None:
            if mask.shape[0] != x.shape[0] or mask.shape[-1] != text.shape[1]:
                return None
            try:
                lengths = self.clip.key_lengths(mask)
            except ValueError:
                return None
        q, k, v = project(attn, x, text)
        q, k, norm = qk_norm(q, k, attn.norm_q, attn.norm_k)
        return leave_projection(attn, cross(q, k, v, lengths=lengths, norm=norm))

    def joint_attention(
        self,
        attn: Any,
        x: Tensor,
        text: Tensor,
        rope: Callable[[Tensor], Rope | None],
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
            rope=rope(q),
            text_lengths=text_lengths,
            text_first=text_first,
        )
        leave_text = getattr(attn, "to_add_out", None)
        out_text = out_text.flatten(2)
        if leave_text is not None:
            out_text = leave_text(out_text)
        elif not added:
            out_text = out_text if attn.to_out is None else attn.to_out[1](attn.to_out[0](out_text))
        return leave_projection(attn, out), out_text

    def text_lengths(self, mask: Tensor | None, tokens: int, text: int) -> Tensor | None:
        """Valid text tokens of a mask over clip and text, text last.

        Raises:
            ValueError: with the reason, if the mask is of another kind.
        """
        if mask is None:
            return None
        if mask.shape[-1] != tokens + text:
            raise ValueError("the attention mask is not one of the clip and the text")
        lengths = self.clip.key_lengths(mask)
        return None if lengths is None else lengths - tokens
