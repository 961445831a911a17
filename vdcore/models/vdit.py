"""The video diffusion transformer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vdcore.mask import FrameMask
from vdcore.models.attention import Context, CrossAttention, SelfAttention
from vdcore.models.block import AdaLNSingle, AdaLNZero, Block, looks_across_frames, modulated_rows
from vdcore.models.cache import FrameCache, new_ring, slots_needed
from vdcore.models.config import VDiTConfig
from vdcore.models.embedding import FinalLayer, PatchEmbedding, TextProjection, TimestepEmbedding
from vdcore.models.layout import Split
from vdcore.models.position import Rotations, full_rope, sincos, sincos_grid, space_rope, time_rope
from vdcore.parallel.agreement import agreed
from vdcore.parallel.gradients import scale_gradient
from vdcore.parallel.peers import part_sizes, peers_of
from vdcore.parallel.plan import TEMPORAL, VIDEO, Layer, Way, choose

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a checkpointed block keeps: out and lse of attention, which is not computed twice then.
KEPT = tuple(
    getattr(torch.ops.vdcore, name).default
    for name in ("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention")
)


def keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing: attention's results are kept, all else is recomputed."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class VDiT(nn.Module):
    """A diffusion transformer on video: patches, blocks under the modulation of timestep and label, patches.

    After DiT (Peebles and Xie 2023), Latte (Ma et al. 2024) and PixArt-alpha (Chen et al. 2023); see
    :class:`VDiTConfig` for what each choice means. Tokens are ``(B, T', S, C)`` from the first layer to the last.

    Args:
        config: what it is made of.
        mesh: a ``DeviceMesh`` of one dimension, whose processes share every video: each passes, and gets, its frames
            (:func:`vdcore.parallel.shard` of token frames), and everything else that has frames alike. Weights must
            be the same on every rank. The loss is the sum of the ranks' losses; parameters' gradients are N times the
            rank's share, for the mean over the mesh to be the gradient of one process, and those of inputs the rank's
            share. Every rank must run backward. No caches.
        plan: how attention across frames is shared out: ``"heads"``, ``"ring"`` or ``"halo"`` with full attention,
            ``"switch"`` or ``"halo"`` with temporal layers; None: what sends the least bytes
            (:func:`vdcore.parallel.explain`).
    """

    def __init__(self, config: VDiTConfig, *, mesh: DeviceMesh | None = None, plan: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.peers, self.plan = None if mesh is None else peers_of("VDiT", mesh), plan
        if plan is not None and (mesh is None or plan not in ways(config)):
            expected = "None without a mesh" if mesh is None else f"{', '.join(ways(config))} or None"
            _wrong("plan", expected, repr(plan))
        if self.ranks > 1 and not isinstance(config.mask, FrameMask):
            _wrong("mesh", "None or of one rank where the mask is not one FrameMask", f"{self.ranks} ranks")
        self.patch = PatchEmbedding(config.in_channels, config.width, config.patch)
        self.time = TimestepEmbedding(config.width)
        self.label = None if config.classes is None else nn.Embedding(config.classes + 1, config.width)
        self.text = None if config.text_width is None else TextProjection(config.text_width, config.width)
        parts = [config.parts(i) for i in range(config.depth)]
        single = config.modulation == "single"
        self.modulation = nn.Linear(config.width, modulated_rows(parts[0]) * config.width) if single else None
        self.blocks = nn.ModuleList(Block(config, p) for p in parts)
        self.final = FinalLayer(config)
        # Where the frame's embedding is added: before the first block that looks across frames (Latte).
        self.first_temporal = next((i for i, p in enumerate(parts) if looks_across_frames(p)), -1)
        initialize(self)

    def forward(
        self,
        video: Tensor,
        timestep: Tensor,
        *,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
        label: Tensor | None = None,
        positions: Tensor | None = None,
        cache: FrameCache | None = None,
        keep: bool = False,
        control: Sequence[Tensor] | None = None,
        frames: int | None = None,
        history: Tensor | None = None,
        history_timestep: Tensor | None = None,
    ) -> Tensor:
        """Predicts what the model was trained to: noise, velocity or clean video.

        Args:
            video: ``(B, C, T, H, W)``; ``T' = T / pt`` token frames.
            timestep: ``(B,)``, ``(B, T')`` for one per token frame, or ``(B, T)`` for one per frame, of which a token
                of several frames has the largest.
            text: ``(B, L, text_width)``, or ``(B, T', L, text_width)`` with a prompt per frame.
            text_lengths: ``(B,)`` or ``(B, T')``, valid text tokens; with 0 nothing is attended to.
            label: ``(B,)`` class indices; ``classes`` means no class, as None does.
            positions: ``(T',)`` positions of the token frames, fractional ones too; None: 0, 1, ..., after the
                frames that a cache holds.
            cache: of :meth:`new_cache`; the chunk sees the frames that it holds.
            keep: also keep this chunk in the cache: what a stream calls once per chunk, with the clean frames.
            control: per block, from the first on, what is added to its result: ``(B, T', S, C)`` each.
            frames: T of the whole, where a mesh shares the frames; None: ranks tell one another what they have, for
                which the host waits.
            history: the clean video, of the shape of ``video``: teacher forcing. Each chunk of ``video`` sees the clean
                chunks before its own, as it would after a cache of them, all chunks in one pass
                (:meth:`FrameMask.teacher_forcing`). For masks that are causal by chunks, ``future=0``, without sinks.
            history_timestep: ``(B,)``, that of clean frames; None: 0.

        Returns:
            ``(B, out_channels, T, H, W)``.

        Raises:
            ValueError, TypeError: if an argument has another shape or dtype, or text and labels do not fit the model.
        """
        given = {"text": text, "text_lengths": text_lengths, "label": label, "positions": positions}
        if history is not None:
            if cache is not None or control is not None or self.ranks > 1:
                _wrong("history", "None with a cache, a control or a mesh of several ranks", tuple(history.shape))
            return self._forced(video, timestep, history, history_timestep, given)
        x, context = self.embed(video, timestep, cache=cache, frames=frames, **given)
        if control is not None and len(control) > len(self.blocks):
            _wrong("control", f"at most {len(self.blocks)} tensors, one per block", len(control))
        for i in range(len(self.blocks)):
            x = self.run(i, x, context, cache)
            if control is not None and i < len(control):
                x = x + scale_gradient(control[i], 1 / self.ranks)
        if cache is not None and keep:
            cache.frames += context.grid[0]
        return scale_gradient(self.final(x, context), self.ranks)

    def _forced(
        self, video: Tensor, timestep: Tensor, history: Tensor, history_timestep: Tensor | None, given: dict[str, Any]
    ) -> Tensor:
        """Clean and noisy video as one sequence of frames; the noisy half of the prediction."""
        mask, B, T, pt = self.config.frame_mask, *video.shape[:3:2], self.config.patch[0]
        if mask.future != 0 or mask.sink or mask.shots or mask.clean:
            _wrong("history", "None where the mask is not causal by chunks, future=0, without sinks and shots", mask)
        if history.shape != video.shape:
            _wrong("history", f"of the video's shape {tuple(video.shape)}", tuple(history.shape))
        if history_timestep is None:
            history_timestep = timestep.new_zeros(B)
        if history_timestep.shape != (B,):
            _wrong("history_timestep", f"(B,) = {(B,)}", tuple(history_timestep.shape))
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, T // pt)
        still = history_timestep.to(timestep.dtype)[:, None].expand_as(timestep)
        given = dict(given)
        for name, axis, ndim in (("text", 1, 4), ("text_lengths", 1, 2)):
            if given[name] is not None and given[name].ndim == ndim:
                given[name] = torch.cat((given[name],) * 2, axis)
        positions = given["positions"]
        if positions is None:
            positions = torch.arange(T // pt, dtype=torch.float64, device=video.device)
        given["positions"] = torch.cat((positions,) * 2)
        x, context = self.embed(torch.cat((history, video), 2), torch.cat((still, timestep), 1), **given)
        context.mask = FrameMask.teacher_forcing(T // pt, mask.chunk, mask.past)
        for i in range(len(self.blocks)):
            x = self.run(i, x, context, None)
        return self.final(x, context)[:, :, T:]

    @property
    def ranks(self) -> int:
        """Processes that share a video."""
        return 1 if self.peers is None else self.peers.ranks

    def embed(
        self,
        video: Tensor,
        timestep: Tensor,
        *,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
        label: Tensor | None = None,
        positions: Tensor | None = None,
        cache: FrameCache | None = None,
        frames: int | None = None,
    ) -> tuple[Tensor, Context]:
        """The tokens ``(B, T', S, C)`` that enter the first block, and what all blocks share."""
        config = self.config
        video, timestep = (scale_gradient(x, 1 / self.ranks) for x in (video, timestep))
        text = None if text is None else scale_gradient(text, 1 / self.ranks)
        x, grid = self._tokens(video)
        B, T = x.shape[:2]
        if frames is None and self.ranks > 1:
            frames = self._frames_of_all(video, timestep, text, text_lengths, label, positions)
        split = self._split(video, x, cache, frames)
        if cache is not None:
            made, here = (cache.batch, *cache.grid, len(cache.rings)), (B, *grid[1:], len(self.blocks))
            if made != here:
                _wrong("cache", f"made for (batch, rows, columns, blocks) = {here}", made)
        start = 0 if cache is None else cache.frames
        if cache is not None and cache.relative:
            if positions is not None:
                _wrong("positions", "None with a relative cache, which has its own", tuple(positions.shape))
            cache.place(T)  # raises where the chunk does not fit
            positions = everywhere = cache.positions(T, x.device)
        else:
            positions, everywhere = self._positions(positions, start, T, split, x.device)
        if timestep.shape == (B, video.shape[2]) != (B, T):
            timestep = timestep.unflatten(1, (T, config.patch[0])).amax(2)
        elif timestep.shape not in ((B,), (B, T)):
            expected = f"(B,), (B, T') or (B, T) = {(B,)}, {(B, T)} or {(B, video.shape[2])}"
            _wrong("timestep", expected, tuple(timestep.shape))
        if split is not None and timestep.ndim == 2:
            timestep = split.all_frames(timestep, 1)
        condition = self._condition(timestep, label)
        activated = F.silu(condition)
        shared = None if self.modulation is None else self.modulation(activated)
        context = Context(
            grid=grid,
            condition=condition,
            activated=activated,
            modulation=None if shared is None else shared.unflatten(-1, (-1, config.width)),
            rotations=self._rotations(grid, positions, everywhere),
            text=self._text(text, B, T),
            text_lengths=text_lengths,
            place=None if cache is None else cache.place(T),
            split=split,
        )
        if config.position != "rope":
            x = x + sincos_grid(grid[1:], config.width, config.base_size, x.device).to(x.dtype)
        if config.position == "sincos":
            context.frame_embedding = sincos(positions, config.width).to(x.dtype)[:, None]
        return x, context

    def run(self, index: int, x: Tensor, context: Context, cache: FrameCache | None) -> Tensor:
        """Block ``index`` on ``(B, T', S, C)``; checkpointed in training where the config says so."""
        if index == self.first_temporal and context.frame_embedding is not None:
            x = x + context.frame_embedding
        block, ring = self.blocks[index], None if cache is None else cache.rings[index]
        if self.config.checkpoint and torch.is_grad_enabled() and ring is None:
            given: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if context.split is None or context.split.plan != "ring":  # of which every part would be kept
                given["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
            return checkpoint(block, x, context, **given)
        return block(x, context, ring)

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        frames: int | None = None,
        dtype: torch.dtype | None = None,
        relative: bool = False,
    ) -> FrameCache:
        """A cache for streams of chunks of ``mask.chunk`` frames.

        Args:
            batch: samples B.
            height, width: of the video.
            frames: the longest stream in token frames, where ``mask.past`` is None.
            dtype: of keys and values; None: autocast's if it is on, else the weights'. ``torch.int8``: a scale per
                frame and head.
            relative: keys are kept without rotation and rotated when they are read, by their place in the window, with
                sinks at 0: a stream goes on for ever at the positions of its first window. With ``position``
                ``"rope"`` or ``"sincos+rope"``.

        Raises:
            ValueError: if the mask is not of frames alone, or sees the future, or sizes are not multiples of the patch.
        """
        config = self.config
        if relative and config.position == "sincos":
            raise ValueError("new_cache: relative must be False with position sincos, which is added to the tokens")
        if dtype is not None and not (dtype.is_floating_point or dtype == torch.int8):
            raise ValueError(f"new_cache: dtype must be a floating point one or torch.int8, got {dtype}")
        for name, size, p in (("height", height, config.patch[1]), ("width", width, config.patch[2])):
            if size % p or size < 1:
                raise ValueError(f"new_cache: {name} must be a multiple of the patch size {p}, got {size}")
        grid = height // config.patch[1], width // config.patch[2]
        slots = slots_needed(config.frame_mask, frames)
        device = self.patch.weight.device
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.patch.weight.dtype
        shape = batch, slots, grid[0] * grid[1], config.kv_heads or config.heads, config.head_dim
        needed = (looks_across_frames(config.parts(i)) for i in range(config.depth))
        rings = [new_ring(shape, dtype, device) if ring else None for ring in needed]
        return FrameCache(config.frame_mask, slots, batch, grid, rings, relative=relative)

    def _tokens(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        config = self.config
        if video.ndim != 5 or video.shape[1] != config.in_channels:
            _wrong("video", f"(B, C, T, H, W) with C = {config.in_channels}", tuple(video.shape))
        x = self.patch(video)
        T, H, W = (n // p for n, p in zip(video.shape[2:], config.patch))
        return x, (T, H, W)

    def _condition(self, timestep: Tensor, label: Tensor | None) -> Tensor:
        """``(B, C)`` or ``(B, T', C)``."""
        condition = self.time(timestep)
        if self.label is None:
            if label is not None:
                _wrong("label", "None for a model without classes", "a tensor")
            return condition
        B = timestep.shape[0]
        if label is None:
            label = torch.full((B,), self.label.num_embeddings - 1, device=timestep.device)
        elif label.shape != (B,) or label.is_floating_point():
            _wrong("label", f"integers (B,) = {(B,)}", f"{label.dtype} {tuple(label.shape)}")
        embedding = self.label(label)
        return condition + (embedding if condition.ndim == 2 else embedding[:, None])

    def _text(self, text: Tensor | None, B: int, T: int) -> Tensor | None:
        width = self.config.text_width
        if self.text is None or text is None:
            if text is not None:
                _wrong("text", "None for a model with text_width None", tuple(text.shape))
            if self.text is not None:
                _wrong("text", f"(B, L, {width}); for no text, any with text_lengths of 0", None)
            return None
        if text.ndim not in (3, 4) or text.shape[-1] != width or text.shape[:-2] not in ((B,), (B, T)):
            _wrong("text", f"(B, L, {width}) or (B, T', L, {width}) with B = {B}, T' = {T}", tuple(text.shape))
        return self.text(text)

    def _frames_of_all(self, video: Tensor, *conditions: Tensor | None) -> int:
        """Frames of the whole, after ranks have told one another that what they pass fits together."""
        assert self.peers is not None
        pt, names = self.config.patch[0], ("timestep", "text", "text_lengths", "label", "positions")
        tensors = dict(zip(names, conditions))
        per_frame = {"timestep": 2, "text": 4, "text_lengths": 2}  # of so many dimensions
        free = {name: 1 for name, ndim in per_frame.items() if (x := tensors[name]) is not None and x.ndim == ndim}
        sizes = agreed(
            "VDiT",
            {"video": video, **tensors},
            {"video": 2, "positions": 0, **free},
            self.peers,
            video.device,
            self,
            {"config": self.config, "plan": self.plan},
        )
        counted = sizes["video"]
        expected = [n * pt for n in part_sizes(sum(counted) // pt, self.ranks)]
        if [*counted] != expected:
            _wrong("video", f"with {expected} frames by rank", [*counted])
        return sum(counted)

    def _split(self, video: Tensor, x: Tensor, cache: FrameCache | None, frames: int | None) -> Split | None:
        """How this pass's frames are shared; checks that these are the rank's."""
        config, (B, T, S, _), pt = self.config, x.shape, self.config.patch[0]
        if self.peers is None or self.ranks == 1:
            if frames is not None and frames != video.shape[2]:
                _wrong("frames", f"the video's {video.shape[2]} without a mesh of several ranks", frames)
            return None
        if cache is not None:
            _wrong("cache", "None with a mesh", "a cache")
        assert frames is not None
        if frames % pt:
            _wrong("frames", f"a multiple of the {pt} frames of a token", frames)
        if self.peers.size(frames // pt) != T:
            expected = f"with the {pt * self.peers.size(frames // pt)} of {frames} frames that rank {self.peers.rank}"
            _wrong("video", f"{expected} of {self.ranks} holds", f"{video.shape[2]} frames")
        heads, kv_heads = config.heads, config.kv_heads or config.heads
        layer = Layer(B, frames // pt, S, heads, kv_heads, config.head_dim, x.element_size(), config.frame_mask)
        plan = choose("VDiT", self.plan, layer, self.ranks, ways(config))
        return Split(self.peers, (frames // pt, S), plan)

    def _positions(
        self, positions: Tensor | None, start: int, T: int, split: Split | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Positions of the frames that this process has, and of all frames of the video."""
        given = positions is not None
        if split is not None:
            start = split.own[0]
        if positions is None:
            positions = torch.arange(start, start + T, dtype=torch.float64, device=device)
        elif positions.shape != (T,):
            _wrong("positions", f"(T',) = {(T,)}", tuple(positions.shape))
        if split is None:
            return positions, positions
        if given:
            return positions, split.all_frames(positions, 0)
        return positions, torch.arange(split.sizes[0], dtype=torch.float64, device=device)

    def _rotations(self, grid: tuple[int, int, int], positions: Tensor, everywhere: Tensor) -> Rotations:
        """Tables of this process's frames; ``time`` is of all frames of the video."""
        config, D = self.config, self.config.head_dim
        if config.position == "sincos":
            return Rotations()
        if config.attention == "full":
            return Rotations(full=full_rope(positions, grid[1:], D, config.rope_theta))
        space = space_rope(grid[1:], D, config.rope_theta, positions.device) if config.position == "rope" else None
        return Rotations(space=space, time=time_rope(everywhere, D, config.rope_theta))


def ways(config: VDiTConfig) -> dict[str, Way]:
    """How processes may share out attention across frames, by name."""
    return {"full": VIDEO, "gated": {"switch": TEMPORAL["switch"]}}.get(config.attention, TEMPORAL)


def initialize(model: VDiT) -> None:
    """DiT's initial weights: every gate of AdaLN-Zero, every text attention and the prediction start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch.weight.view(model.config.width, -1))
    for layer in (model.time.up, model.time.proj, model.modulation, model.label):
        if layer is not None:
            nn.init.normal_(layer.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, AdaLNZero):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, (AdaLNSingle, FinalLayer)) and module.table is not None:
            nn.init.normal_(module.table, std=model.config.width**-0.5)
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, SelfAttention) and model.config.beside:
            module.init_neighbor_bias(model.config)
    if model.final.modulation is not None:
        nn.init.zeros_(model.final.modulation.weight)


def _wrong(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"VDiT: {name} must be {expected}, got {got}")
