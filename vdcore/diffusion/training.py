"""Training a video DiT: what a step is, and all that is needed to take the next one as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.diffusion import checkpoint
from vdcore.diffusion.checkpoint import CheckpointError
from vdcore.diffusion.data import Source
from vdcore.diffusion.process import Process, values
from vdcore.extras import need
from vdcore.models import VDiT, VDiTConfig
from vdcore.parallel import average_gradients
from vdcore.parallel.gradients import total
from vdcore.parallel.peers import part_sizes
from vdcore.video.scenes import MovingShapes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Smooth shades of few colors: fine textures and all hues take a model this small most of its training, and tell
# nothing of motion.
SCENES = MovingShapes(
    frames=8,
    size=(24, 24),
    objects=1,
    radius=(5.0, 8.0),
    speed=(0.75, 2.0),
    object_wave=(12.0, 24.0),
    background_wave=(24.0, 64.0),
    object_hue=(0.0, 0.1),
    background_hue=(0.55, 0.65),
)
TARGETS = ("sample", "flow", "v_prediction", "epsilon")
SMALL = VDiTConfig(
    in_channels=3,
    patch=(2, 3, 3),
    width=96,
    depth=6,
    heads=3,
    # Of 256 tokens, what moves is found where it went: 0.6 of real motion after 800 steps, where factorized layers of
    # this width came to 0.4 after 1500 and no further.
    attention="full",
    position="rope",
    rope_theta=100.0,  # the grid has 8 rows: the slow turns of 1e4 would tell its tokens apart in nothing
    beside=True,  # else samples are mosaics until neighbors have found one another, most of the training later
    qk_norm=True,
)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        model: the network; videos have its ``in_channels``.
        target: what it predicts: ``"sample"`` (clean video) and ``"flow"`` under flow matching, ``"v_prediction"``
            and ``"epsilon"`` under DDIM's noise.
        shift: of a flow's timesteps towards noise, ``t -> s t / (1 + (s - 1) t)`` (Esser et al. 2024): frames repeat
            one another, so that it takes more noise to hide a video than an image.
        sampling_shift: the same of the sampler's timesteps; where they are few, most are for what is settled first.
        frames, size: of a clip, ``(H, W)`` in pixels.
        batch, steps: clips in a step, and steps.
        lr, warmup: AdamW's learning rate: rises over ``warmup`` steps, then falls in a straight line to 0.
        ema: decay of the averaged weights, reached from below, ``(1 + n) / (10 + n)`` after n steps.
        hold: share of clips of which some frames are given clean: the first ones, or both ends; whole tokens.
        forcing: share of clips whose tokens' frames have timesteps of their own (diffusion forcing).
        causal: teacher forcing: every chunk of the model's mask, which is causal by chunks, has a timestep of its own
            and is given the clean chunks before it, so that the model rolls on without end. Without hold and forcing.
        clip_norm: largest norm of the gradient.
        seed: of the weights and of all that is drawn.
    """

    model: VDiTConfig = SMALL
    target: str = "sample"
    shift: float = 4.0
    sampling_shift: float = 8.0
    frames: int = 8
    size: tuple[int, int] = (24, 24)
    batch: int = 8
    steps: int = 2000
    lr: float = 3e-3
    warmup: int = 50
    ema: float = 0.99
    hold: float = 0.2
    forcing: float = 0.0
    causal: bool = False
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        for name in ("frames", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("ema", "hold", "forcing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Recipe: {name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("shift", "sampling_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Recipe: {name} must be positive, got {getattr(self, name)}")
        if self.target not in TARGETS:
            raise ValueError(f"Recipe: target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.causal:
            mask = self.model.frame_mask
            if mask.future != 0 or mask.sink or mask.shots or mask.clean:
                raise ValueError(f"Recipe: causal needs a mask with future=0 and neither sink nor shots, got {mask}")
            if self.hold or self.forcing:
                raise ValueError(f"Recipe: hold and forcing must be 0 with causal, got {self.hold} and {self.forcing}")
        sizes = zip(("frames", "height", "width"), (self.frames, *self.size), self.model.patch)
        for name, size, patch in sizes:
            if size % patch or size < 1:
                raise ValueError(f"Recipe: {name} must be a multiple of the patch size {patch}, got {size}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "model": json.loads(self.model.to_json())}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Recipe:
        return Recipe(**{**values, "model": VDiTConfig.from_json(json.dumps(values["model"]))})


# For real films. Where a token is in the picture is added to what it carries, by which the model remembers places: with
# rotation alone one of this size learned nothing of a film in minutes.
FILMS = Recipe(model=replace(SMALL, patch=(2, 4, 4), position="sincos+rope"), size=(32, 32), steps=8000)


def process_for(target: str, shift: float = 1.0) -> Process:
    """The process that a target belongs to, on a scheduler of diffusers; ``shift`` is a flow's."""
    diffusers = need("diffusers", "models", "process_for")
    if target in ("sample", "flow"):
        return Process(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), predicts=target)  # type: ignore[arg-type]
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type=target, timestep_spacing="trailing"
    )
    return Process(scheduler)


def draw_timesteps(process: Process, shape: tuple[int, ...], generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Uniform over what a sampler steps through: shifted under flow matching, the discrete timesteps otherwise.

    Where things are and how they move is settled in the first steps from pure noise, to which a logit-normal
    distribution (Esser et al. 2024) leaves 3 of 100 draws: a model this small then never learns it.
    """
    if process.steps_on == "flow":
        u = torch.rand(shape, generator=generator)
        return shift * u / (1 + (shift - 1) * u) * process.train_timesteps
    return torch.randint(process.train_timesteps, shape, generator=generator).float()


def draw_held(batch: int, frames: int, share: float, generator: torch.Generator) -> Tensor:
    """``(B, T)`` bool: a share of the clips has its first 1 to T/2 frames held, or, one time in three, both ends.

    Frames are those of tokens: each is one or more of the video's.
    """
    chosen, ends, count = torch.rand(3, batch, generator=generator).unsqueeze(-1)
    frame = torch.arange(frames)
    first = frame < 1 + (count * max(frames // 2, 1)).floor()
    both = (frame == 0) | (frame == frames - 1)
    held = torch.where(ends < 1 / 3, both, first) & (chosen < share)
    return held & ~held.all(1, keepdim=True)  # something is left to predict


class Trainer:
    """A model, its average, its optimizer and its random stream.

    Args:
        recipe: how to train.
        source: clips of the recipe's frames and size.
        device: where to compute; what is random is drawn on the CPU, the same everywhere.
        mesh: processes that share every clip, each with its frames. All draw the same clips and noise; a checkpoint is
            that of one process, and goes on with any number of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.recipe, self.source, self.device, self.mesh = recipe, source, torch.device(device), mesh
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = VDiT(recipe.model, mesh=mesh).to(device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.process = process_for(recipe.target, recipe.shift)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.step_count = 0

    def step(self) -> float:
        """One step on one batch; returns its loss.

        Raises:
            FloatingPointError: if the loss is not finite; the weights are untouched then.
        """
        recipe, random = self.recipe, self.random
        clean = self.source.batch(recipe.batch, random) * 2 - 1
        noise = torch.randn(clean.shape, generator=random)
        together = recipe.model.patch[0]  # frames of a token
        tokens = recipe.frames // together
        timestep = draw_timesteps(self.process, (recipe.batch, tokens), random, recipe.shift)
        held = draw_held(recipe.batch, tokens, recipe.hold, random).repeat_interleave(together, 1)
        timestep = timestep.repeat_interleave(together, 1)
        forced = torch.rand(recipe.batch, 1, generator=random) < recipe.forcing
        if recipe.causal:
            chunk = together * recipe.model.frame_mask.chunk
            timestep = timestep[:, torch.arange(recipe.frames) // chunk * chunk]
        elif recipe.hold or recipe.forcing:
            timestep = torch.where(forced, timestep, timestep[:, :1])
        else:
            timestep = timestep[:, 0]
        ahead = getattr(self.source, "prefetch", None)
        if ahead is not None and self.step_count + 1 < recipe.steps:
            state = torch.Generator()
            state.set_state(random.get_state())
            ahead(recipe.batch, state)  # while this step computes
        clean, noise, timestep, held = (x.to(self.device) for x in (clean, noise, timestep, held))
        loss = self._loss(clean, noise, timestep, held if recipe.hold else None)
        value = (loss if self.mesh is None else total(loss.detach(), self.mesh)).item()
        if not math.isfinite(value):
            raise FloatingPointError(f"Trainer: the loss of step {self.step_count} is {value}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.mesh is not None:
            average_gradients(self.model, self.mesh)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * self._lr_factor()
        self.optimizer.step()
        self.step_count += 1
        self._average_weights()
        return value

    def _loss(self, clean: Tensor, noise: Tensor, timestep: Tensor, held: Tensor | None) -> Tensor:
        """The loss of the clips; with a mesh this rank's share of it."""
        if self.recipe.causal:
            still = self.process.model_timestep(timestep.new_full((len(clean),), self.process.clean))
            given = {"history": clean, "history_timestep": still}
            return self.process.loss(self.model, clean, noise, timestep, **given)
        if self.mesh is None:
            return self.process.loss(self.model, clean, noise, timestep, held)
        together, N, rank = self.recipe.model.patch[0], self.mesh.size(), self.mesh.get_local_rank()
        parts = [n * together for n in part_sizes(self.recipe.frames // together, N)]
        count = values(clean, held)
        clean, noise = (x.split(parts, 2)[rank] for x in (clean, noise))
        timestep = timestep if timestep.ndim == 1 else timestep.split(parts, 1)[rank]
        held = None if held is None else held.split(parts, 1)[rank]
        return self.process.loss(self.model, clean, noise, timestep, held, count, frames=self.recipe.frames)

    def _lr_factor(self) -> float:
        n, recipe = self.step_count, self.recipe
        return min((n + 1) / max(recipe.warmup, 1), (recipe.steps - n) / max(recipe.steps - recipe.warmup, 1), 1.0)

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = min(self.recipe.ema, (1 + self.step_count) / (10 + self.step_count))
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Everything that the next step depends on, in one file, written whole or not at all."""
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": x for name, x in self.average.items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": x for key, x in self.optimizer.state[p].items()}
        tensors["random"] = self.random.get_state()
        notes = {"step": self.step_count, "recipe": self.recipe.to_dict(), "source": self.source.describe()}
        return checkpoint.save(path, tensors, notes)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Goes on where :meth:`save` stood, with the same random stream.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is no checkpoint of this recipe and source.
        """
        tensors, notes = checkpoint.load(path)
        for name, ours in (("recipe", self.recipe.to_dict()), ("source", self.source.describe())):
            theirs, ours = notes.get(name), json.loads(json.dumps(ours))
            if theirs != ours:
                raise CheckpointError(f"checkpoint: {path}: trained with another {name}: {_differences(theirs, ours)}")
        try:
            self.model.load_state_dict(checkpoint.part(tensors, "model"))
            average = checkpoint.part(tensors, "ema")
            for name, x in self.average.items():
                x.copy_(average[name])
            for name, p in self.model.named_parameters():
                state = checkpoint.part(tensors, f"optimizer.{name}")
                # The step counter stays where AdamW keeps it, the moments go where the weights are.
                self.optimizer.state[p] = {k: x if k == "step" else x.to(self.device) for k, x in state.items()}
            self.random.set_state(tensors["random"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint: {path}: not of this model: {error}") from None
        self.step_count = notes["step"]


@dataclass(frozen=True)
class Trained:
    """A model to sample from, with its averaged weights."""

    model: VDiT
    recipe: Recipe
    step: int
    source: dict[str, Any] = field(default_factory=dict)


def load_trained(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Trained:
    """The averaged model of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no checkpoint of a VDiT.
    """
    tensors, notes = checkpoint.load(path)
    try:
        recipe = Recipe.from_dict(notes["recipe"])
        model = VDiT(recipe.model)
        weights = {**checkpoint.part(tensors, "model"), **checkpoint.part(tensors, "ema")}
        model.load_state_dict(weights)
        step, source = int(notes["step"]), notes["source"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {path}: not of a VDiT of this version: {error}") from None
    return Trained(model.to(device).eval(), recipe, step, source)


def _differences(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict):
        return f"got {theirs!r}"
    names = sorted({*theirs, *ours})
    return "; ".join(f"{n} {theirs.get(n)!r}, now {ours.get(n)!r}" for n in names if theirs.get(n) != ours.get(n))
