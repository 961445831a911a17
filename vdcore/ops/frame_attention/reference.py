"""Oracle of spatial and video attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.qk_norm_rope.reference import norm_rope
from vdcore.ops.temporal_attention.reference import (
    attend,
    counts,
    heads_first,
    keep,
    seeing_frames,
    seen_frames,
    visible_runs,
)
from vdcore.rope import Rope


def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    text: tuple[Tensor, Tensor, Tensor] | None,
    text_lengths: Tensor | None,
    text_norm: QKNorm | None,
    text_first: bool,
    text_sees: str,
    scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
) -> tuple[Tensor, Tensor]:
    """Every token attends to all tokens of the frames that its frame sees, and to the text.

    q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``, text q, k, v ``(B, L, heads, D)``; returns out
    ``(B, T*S + L, H, D)`` in q's dtype, text last or first, and lse ``(B, T*S + L, H)`` in float32 at least. Spatial
    attention is ``mask=FrameMask.same_frame()``.
    """
    B, T, S, H, D = q.shape
    T_k, L = k.shape[1], 0 if text is None else text[0].shape[1]
    dtype = compute_dtype(q.dtype)
    runs = visible_runs(mask, T, T_k, q_start, lengths, B)
    frames, text_valid = counts(lengths, B, max(T_k, q_start + T)), counts(text_lengths, B, L)
    valid = [min(n, T_k) for n in frames]
    alive = [[q_start + t < n for t in range(T)] for n in frames]
    text_reads_video = text is not None and text_sees == "all"

    # Rows that take part: the others may hold anything.
    queries, keys = seeing_frames(runs, T), seen_frames(runs, T_k)
    for b in range(B):
        if text_valid[b]:
            queries[b] |= torch.tensor(alive[b], dtype=torch.bool)
            if text_reads_video:
                keys[b, : valid[b]] = True
    qr, kr = norm_rope(keep(q, queries), keep(k, keys), norm, rope, q_start)
    vr = v.to(dtype)
    if text is not None:
        live = torch.tensor([[i < n for i in range(L)] for n in text_valid], dtype=torch.bool).reshape(B, L)
        tq, tk = (keep(x, live).to(dtype) for x in text[:2])
        tv = text[2].to(dtype)
        if text_norm is not None:
            tq, tk = text_norm.q(tq), text_norm.k(tk)

    out, lse = [], []
    for b in range(B):
        text_keys = [] if text is None else [(tk[b, : text_valid[b]], tv[b, : text_valid[b]])]

        def rows(queries: Tensor, keys: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            """Queries ``(n, H, D)`` against the concatenation of ``(m, G, D)`` pieces."""
            ks = torch.cat([heads_first(a, H) for a, _ in keys], -2) if keys else kr.new_zeros(H, 0, D)
            vs = torch.cat([heads_first(a, H) for _, a in keys], -2) if keys else vr.new_zeros(H, 0, D)
            o, s = attend(queries.transpose(0, 1), ks, vs, scale)
            return o.transpose(0, 1), s.transpose(0, 1)

        video = []
        for t in range(T):
            frame_keys = [(kr[b, x:y].flatten(0, 1), vr[b, x:y].flatten(0, 1)) for x, y in runs[b][t]]
            video.append(rows(qr[b, t], frame_keys + text_keys if alive[b][t] else []))
        sequence = video
        if text is not None:
            n, m = text_valid[b], valid[b] if text_reads_video else 0
            all_keys = [(kr[b, :m].flatten(0, 1), vr[b, :m].flatten(0, 1))] + text_keys
            parts = [rows(tq[b, :n], all_keys), rows(tq[b, n:], [])]
            sequence = parts + video if text_first else video + parts
        out.append(torch.cat([o for o, _ in sequence]) if sequence else qr.new_zeros(0, H, D))
        lse.append(torch.cat([s for _, s in sequence]) if sequence else qr.new_zeros(0, H))
    N = T * S + L
    if not out:
        return q.new_zeros(B, N, H, D), qr.new_zeros(B, N, H)
    return torch.stack(out).to(q.dtype), torch.stack(lse)
