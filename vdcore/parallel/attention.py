"""Video attention over frames that several processes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import check, cross_attention, qk_norm_rope
from vdcore.ops import video_attention as whole_video_attention
from vdcore.parallel.halo import halo_of, key_frames
from vdcore.parallel.peers import Peers, part_sizes, peers_of, starts_of
from vdcore.parallel.plan import VIDEO, Layer, choose
from vdcore.parallel.ring import Ring, ring_attention, weight
from vdcore.parallel.switch import Move, gather_along, moved, start_move
from vdcore.rope import Rope

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

OP = "parallel.video_attention"
Triple = tuple[Tensor, Tensor, Tensor]


def video_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mesh: DeviceMesh | Peers,
    frames: int,
    mask: FrameMask = FrameMask(),
    lengths: Tensor | None = None,
    text: Triple | None = None,
    text_lengths: Tensor | None = None,
    text_norm: QKNorm | None = None,
    text_sees: str = "all",
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
    plan: str | None = None,
    backend: str | None = None,
) -> Any:
    """:func:`vdcore.video_attention` of a video whose frames are split over ranks; each passes and gets its own.

    Three plans. ``"heads"``: whole frames to whole heads, by all-to-alls, and back (Ulysses, Jacobs et al. 2023).
    ``"ring"``: shards of keys and values pass from rank to rank, each while attention to the one before computes, and
    results are merged by their lse (Liu et al. 2023). ``"halo"``: each rank gets the frames that the mask shows it and
    no others; none, where it sees only its own. By default the one whose busiest rank sends least (:func:`explain`);
    heads only where the ranks divide them.

    Args:
        q, k, v: of this rank's frames: ``(B, T_r, S, H, D)``, ``(B, T_r, S, G, D)``, or q packed
            ``(B, T_r, S, 3, H, D)``.
        mesh: a ``DeviceMesh`` of one dimension.
        frames: T of the whole; a rank's frames are those that :func:`shard` gives it.
        mask, scale, norm, backend: as in :func:`vdcore.video_attention`, the mask in frames of the whole.
        lengths: ``(B,)``, valid frames of the whole; not with the plan ``"ring"``.
        text: ``(q, k, v)``, each ``(B, L, heads, D)``, the same on every rank; counted once.
        text_lengths, text_norm, text_sees: as in :func:`vdcore.video_attention`.
        rope: a table of this rank's frames, or of one for all.
        plan: one of these three; None: by bytes (:func:`explain`).

    Returns:
        ``(B, T_r, S, H, D)``, with ``return_lse`` also lse ``(B, T_r, S, H)``. With text ``(out, out_text)``, the
        second ``(B, L, H, D)`` on every rank, and no lse.

    Raises:
        ValueError, TypeError: as :func:`vdcore.video_attention`; if q has not this rank's frames; an unknown plan.
        ExchangeError: a rank has ended, came with another shape, or not within the group's timeout.
    """
    peers = peers_of(OP, mesh)
    q, k, v = check.check_qkv(OP, *check.autocast(check.check_tensor(OP, "q", q), k, v)).views
    check.check_start(OP, "frames", frames)
    if q.shape[1] != peers.size(frames) or k.shape[1] != q.shape[1]:
        expected = f"the {peers.size(frames)} frames of rank {peers.rank} of {peers.ranks}, of {frames} in all"
        check.wrong(OP, "q and k", expected, f"{q.shape[1]} and {k.shape[1]}")
    check.check_mask_type(OP, mask)
    lengths = check.check_lengths(OP, "lengths", lengths, [(q.shape[0],)], "(B,)", q)
    if return_lse and text is not None:
        check.wrong(OP, "return_lse", "False with text", True)
    text, text_lengths, text_norm = check.check_text(OP, text, text_lengths, text_norm, text_sees, q, k.shape[3])
    shared = Shared(peers, frames, mask, check.check_scale(OP, scale, q.shape[-1]), lengths, plan, backend)
    if isinstance(rope, Rope) and rope.cos.shape[0] not in (1, q.shape[1]):
        check.wrong(OP, "rope.cos", f"of 1 or of this rank's {q.shape[1]} frames", check.shape_of(rope.cos))
    if norm is not None or rope is not None:
        q, k = qk_norm_rope(q, k, norm=norm, rope=rope)
    if text is None:
        out, lse = shared.attend(q, k, v, lse=return_lse)
        return (out, lse) if return_lse else out
    if text_norm is not None:
        text = text_norm.q(text[0]).to(q.dtype), text_norm.k(text[1]).to(q.dtype), text[2]
    return shared.attend_with_text((q, k, v), text, text_lengths, text_sees == "all")


@dataclass(frozen=True)
class Shared:
    """Attention over split frames, all but its tensors."""

    peers: Peers
    frames: int
    mask: FrameMask
    scale: float
    lengths: Tensor | None = None
    plan: str | None = None
    backend: str | None = None

    def chosen(self, q: Tensor, k: Tensor) -> str:
        """The plan for these queries and keys."""
        B, _, S, H, D = q.shape
        layer = Layer(B, self.frames, S, H, k.shape[3], D, q.element_size(), self.mask)
        ways = VIDEO if self.lengths is None else {name: way for name, way in VIDEO.items() if name != "ring"}
        return choose(OP, self.plan, layer, self.peers.ranks, ways)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, lse: bool = False) -> tuple[Tensor, Tensor]:
        """Out and, if it is wanted, lse of this rank's frames; q and k are normalized and rotated."""
        plan = self.chosen(q, k)
        if self.peers.ranks == 1:
            return self._operator(q, k, v, 0, self.lengths)
        if plan == "heads":
            H, G = q.shape[3], k.shape[3]
            q, k, v = self.to_heads(q, k, v)
            out, logs = self._operator(q, k, v, 0, self.lengths)
            return self.to_frames(out, H, G), self.to_frames(logs, H, G) if lse else logs
        if plan == "ring":
            return ring_attention(q, k, v, Ring(self.peers, self.frames, self.mask, self.scale, self.backend))
        halo = halo_of(self.mask, self.frames, self.peers)
        k, v = key_frames(halo, k, v)
        return self._operator(q, k, v, halo.q_start, halo.lengths(self.lengths))

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return whole_video_attention(
            q,
            k,
            v,
            mask=self.mask,
            q_start=q_start,
            lengths=lengths,
            scale=self.scale,
            return_lse=True,
            backend=self.backend,
        )

    # ---- Heads ----

    def _move(self, heads: int, groups: int) -> Move:
        """From frame shards to head shards: key heads by rank, query heads with theirs."""
        N = self.peers.ranks
        sizes = tuple(n * (heads // max(groups, 1)) for n in part_sizes(groups, N))
        return Move(self.peers, 1, part_sizes(self.frames, N), 3, sizes)

    def to_heads(self, *tensors: Tensor) -> Any:
        """q, k and v of all frames, and of this rank's heads; all three are under way at once."""
        groups = tensors[1].shape[3]
        started = [start_move(x, self._move(x.shape[3], groups)) for x in tensors]
        return [x.finish() for x in started]

    def to_frames(self, x: Tensor, heads: int, groups: int) -> Tensor:
        """``(B, T, S, H_r, ...)`` to ``(B, T_r, S, H, ...)``."""
        return moved(x, self._move(heads, groups).back())

    # ---- Text ----

    def attend_with_text(
        self, qkv: Triple, text: Triple, text_lengths: Tensor | None, sees_video: bool
    ) -> tuple[Tensor, Tensor]:
        """Out of this rank's frames, and of the text, which every rank gets whole."""
        q, k, v = qkv
        L, N, G = text[0].shape[1], self.peers.ranks, k.shape[3]
        if N > 1 and self.chosen(q, k) == "heads":
            heads = [self._move(x.shape[2], G).target_sizes for x in text]
            mine = [x.narrow(2, starts_of(n)[self.peers.rank], n[self.peers.rank]) for x, n in zip(text, heads)]
            out, out_text = whole_video_attention(
                *self.to_heads(q, k, v),
                text=(mine[0], mine[1], mine[2]),
                text_lengths=text_lengths,
                text_sees="all" if sees_video else "text",
                mask=self.mask,
                q_start=0,
                lengths=self.lengths,
                scale=self.scale,
                backend=self.backend,
            )
            return self.to_frames(out, q.shape[3], G), gather_along(out_text, self.peers, 2, heads[0])
        of_text, text_lse = self._cross(q, text[1], text[2], text_lengths)
        if self.lengths is not None:
            here = torch.arange(q.shape[1], device=q.device) + self.peers.start(self.frames)
            text_lse = torch.where((here < self.lengths[:, None])[..., None, None], text_lse, -torch.inf)
        parts = [self.attend(q, k, v, lse=True), (of_text, text_lse)]
        out = merged(parts).to(q.dtype)
        text_q = text[0].unsqueeze(1)  # a video of one frame
        parts = [self._cross(text_q, text[1], text[2], text_lengths)]
        if sees_video:
            parts += self._of_video(text_q, k, v)
        out_text = merged(parts).to(q.dtype).squeeze(1)
        if text_lengths is not None:
            live = torch.arange(L, device=q.device) < text_lengths[:, None]
            out_text = torch.where(live[..., None, None], out_text, 0.0)
        return out, out_text

    def _cross(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return cross_attention(q, k, v, lengths=lengths, scale=self.scale, return_lse=True, backend=self.backend)

    def _of_video(self, text_q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the text sees of every rank's frames: out ``(B, 1, L, H, D)`` and lse of each, from that rank."""
        begin, S = self.peers.start(self.frames), k.shape[2]
        own = None if self.lengths is None else (self.lengths - begin).clamp(0, k.shape[1]) * S
        out, lse = self._cross(text_q, k.flatten(1, 2), v.flatten(1, 2), own)
        each = (1,) * self.peers.ranks
        outs, lses = (gather_along(x, self.peers, 1, each) for x in (out.to(lse.dtype), lse))
        return [(o[:, None], s[:, None]) for o, s in zip(outs.unbind(1), lses.unbind(1))]


def merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One result of partial ones, each with its lse, in their order; float32 at least, differentiable."""
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    shares = torch.stack([weight(lse, torch.where(top == -torch.inf, 0.0, top)) for lse in lses])
    total = shares.sum(0)
    total = torch.where(total == 0, 1.0, total)
    out = parts[0][0].to(lses.dtype) * (shares[0] / total)[..., None]
    for (part, _), share in zip(parts[1:], shares[1:]):
        out = out + part * (share / total)[..., None]
    return out
