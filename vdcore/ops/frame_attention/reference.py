"""Oracle of spatial and video attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.call import Triple
from vdcore.ops.qk_norm_rope.reference import norm_rope
from vdcore.ops.temporal_attention.reference import attend, counts, heads_first, keep
from vdcore.rope import Rope


def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: FrameMask | HeadMasks,
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
    """Every token attends to all tokens of the frames that its frame sees, or to those in its window, and to the text.

    q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``, text q, k, v ``(B, L, heads, D)``; returns out
    ``(B, T*S + L, H, D)`` in q's dtype, text last or first, and lse ``(B, T*S + L, H)`` in float32 at least. Spatial
    attention is ``mask=FrameMask.same_frame()``.
    """
    B, T, S, H, D = q.shape
    (T_k, G), L = k.shape[1:4:2], 0 if text is None else text[0].shape[1]
    dtype = compute_dtype(q.dtype)
    frames, text_valid = counts(lengths, B, max(T_k, q_start + T)), counts(text_lengths, B, L)
    valid = [min(n, T_k) for n in frames]
    alive = [min(max(n - q_start, 0), T) for n in frames]
    text_reads_video = text is not None and text_sees == "all"
    groups = [token_groups(mask, T, T_k, S, q_start, H, valid[b], alive[b]) for b in range(B)]

    # Rows that take part: the others may hold anything.
    queries, keys = torch.zeros(B, T * S, H, dtype=torch.bool), torch.zeros(B, T_k * S, H, dtype=torch.bool)
    for b in range(B):
        for first, end, sets in groups[b]:
            for some, seen in sets:
                if len(seen):
                    queries[b, some, first:end] = True
                    keys[b, seen, first:end] = True
        if text_valid[b]:
            queries[b, : alive[b] * S] = True
            if text_reads_video:
                keys[b, : valid[b] * S] = True
    q_live, k_live = queries.view(B, T, S, H), keys.view(B, T_k, S, G, H // G).any(-1) if G else keys.view(B, T_k, S, 0)
    if norm is not None and norm.over == "all":  # one head's values reach the others through it
        q_live, k_live = (x.any(-1, keepdim=True).expand_as(x) for x in (q_live, k_live))
    qr, kr = norm_rope(keep(q, q_live), keep(k, k_live), norm, rope, q_start)
    vr = v.to(dtype)
    if text is not None:
        live = torch.tensor([[i < n for i in range(L)] for n in text_valid], dtype=torch.bool).reshape(B, L)
        tq, tk = (keep(x, live).to(dtype) for x in text[:2])
        tv = text[2].to(dtype)
        if text_norm is not None:
            tq, tk = text_norm.q(tq), text_norm.k(tk)

    out, lse = [], []
    for b in range(B):
        qb, kb, vb = (x[b].flatten(0, 1) for x in (qr, kr, vr))
        words = [] if text is None else [(tk[b, : text_valid[b]], tv[b, : text_valid[b]])]
        sequence = [_video_rows((qb, kb, vb), groups[b], words, alive[b] * S, scale)]
        if text is not None:
            n, m = text_valid[b], valid[b] * S if text_reads_video else 0
            said = rows(tq[b, :n], [(kb[:m], vb[:m]), *words], scale)
            sequence += [said, rows(tq[b, n:], [], scale)]
            if text_first:
                sequence = sequence[1:] + sequence[:1]
        out.append(torch.cat([o for o, _ in sequence]))
        lse.append(torch.cat([s for _, s in sequence]))
    N = T * S + L
    if not out:
        return q.new_zeros(B, N, H, D), qr.new_zeros(B, N, H)
    return torch.stack(out).to(q.dtype), torch.stack(lse)


# ---- What references of attention over tokens are made of ----

Keys = tuple[Tensor, Tensor]  # keys and values (m, G, D)
Sets = list[tuple[Tensor, Tensor]]  # query tokens, and the key tokens that each of them sees: indices


def rows(queries: Tensor, keys: list[Keys], scale: float) -> tuple[Tensor, Tensor]:
    """Queries ``(n, H, D)`` against the concatenation of ``(m, G, D)`` pieces: ``(n, H, D)`` and lse ``(n, H)``."""
    H, D = queries.shape[1:]
    ks, vs = (
        torch.cat([heads_first(pair[i], H) for pair in keys], -2) if keys else queries.new_zeros(H, 0, D)
        for i in range(2)
    )
    o, s = attend(queries.transpose(0, 1), ks, vs, scale)
    return o.transpose(0, 1), s.transpose(0, 1)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of ascending indices; a view where they follow one another."""
    if len(tokens) and int(tokens[-1]) - int(tokens[0]) == len(tokens) - 1:
        return x[int(tokens[0]) : int(tokens[-1]) + 1]
    return x[tokens.to(x.device)]


def _video_rows(
    qkv: Triple, groups: list[tuple[int, int, Sets]], words: list[Keys], alive: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v ``(n, heads, D)`` of one sample, of which the first ``alive`` query tokens see the text too."""
    q, k, v = qkv
    shared = q.shape[1] // k.shape[1] if k.shape[1] else 1
    parts = []
    for first, end, sets in groups:
        mine, theirs = slice(first, end), slice(first // shared, end // shared)
        text = [(a[:, theirs], b[:, theirs]) for a, b in words]
        found = []
        for some, seen in sets:
            keys = [(take(k, seen)[:, theirs], take(v, seen)[:, theirs])]
            found.append(rows(take(q, some)[:, mine], keys + (text if some[0] < alive else []), scale))
        order = torch.cat([some for some, _ in sets]).argsort()
        parts.append(tuple(torch.cat(each)[order] for each in zip(*found)))
    if not parts:
        return q, q.new_zeros(q.shape[:2])
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def token_groups(
    mask: FrameMask | HeadMasks, T: int, T_k: int, S: int, q_start: int, H: int, valid: int, alive: int
) -> list[tuple[int, int, Sets]]:
    """Per group of heads ``(first, end, sets)``: every query token is in one set.

    Args:
        valid, alive: key frames that can be seen, query frames that can see.
    """
    if isinstance(mask, FrameMask):
        alike: dict[Any, list[int]] = {}  # frames that see the same
        for t, runs in enumerate(mask.runs(T, T_k, q_start)):
            alike.setdefault((t < alive, runs if t < alive else ()), []).append(t)
        frames = torch.arange(max(T, T_k) * S).view(max(T, T_k), S)
        sets = []
        for (_, runs), some in alike.items():
            shown = [frames[begin : min(end, valid)].flatten() for begin, end in (*runs, (0, 0))]
            sets.append((frames[some].flatten(), torch.cat(shown)))
        return [(0, H, sets)] if T * S else []
    found = []
    for first, end, one in mask.heads():
        seen = one.visible(T, *mask.grid, T_k, q_start)
        seen[alive * S :] = False
        seen[:, valid * S :] = False
        live = torch.arange(T * S)[:, None] < alive * S
        kinds, kind = torch.unique(torch.cat((seen, live), 1), dim=0, return_inverse=True)
        sets = [(torch.nonzero(kind == i)[:, 0], torch.nonzero(kinds[i, :-1])[:, 0]) for i in range(len(kinds))]
        if T * S:
            found.append((first, end, sets))
    return found
