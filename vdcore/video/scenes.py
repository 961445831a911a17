"""A synthetic set: textured objects in constant motion over a textured background, some behind static occluders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdcore.video.render import Array, Background, Layers, Scene

GOLDEN = 0x9E3779B97F4A7C15
BACKGROUND_WAVES = 3
OBJECT_DRAWS, OCCLUDER_DRAWS = 18, 8  # random numbers of one of each; the background takes what is left
BACKGROUND_DRAWS = 8 + 3 * BACKGROUND_WAVES


@dataclass(frozen=True)
class MovingShapes:
    """Clips without end, one for every index below 2**63, each a function of ``(seed, index)`` alone.

    Objects keep a velocity of any direction, below a pixel included; where they meet, a later one covers an earlier
    one. Occluders are vertical gray bars that stand still, in front of everything.

    Args:
        frames: T.
        size: ``(H, W)``, pixels.
        objects, occluders: how many in a clip.
        radius: least and most half width of an object, pixels.
        speed: least and most pixels per frame.
        spin: most radians per frame that an object turns.
        bounce: objects turn back at the border. Otherwise they pass through the picture: halfway through the clip
            their centers are inside.
        pan: most pixels per frame, in each direction, that the background moves.
        object_wave, background_wave: shortest and longest wave of the textures, pixels; waves much longer than the
            picture leave smooth shades.
        object_hue, background_hue: least and most hue, in turns from red over green and blue; a narrow range leaves
            shapes and motion to learn, and little of color.
        seed: another seed is another set.

    Raises:
        ValueError: on sizes, counts and ranges that make no scene.
    """

    frames: int = 16
    size: tuple[int, int] = (32, 32)
    objects: int = 2
    occluders: int = 1
    radius: tuple[float, float] = (3.0, 5.5)
    speed: tuple[float, float] = (0.3, 1.5)
    spin: float = 0.0
    bounce: bool = False
    pan: float = 0.0
    object_wave: tuple[float, float] = (4.0, 8.0)
    background_wave: tuple[float, float] = (6.0, 24.0)
    object_hue: tuple[float, float] = (0.0, 1.0)
    background_hue: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("objects", 0), ("occluders", 0), ("spin", 0), ("pan", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"MovingShapes: {name} must be at least {least}, got {getattr(self, name)}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"MovingShapes: size must be two positive numbers (H, W), got {self.size}")
        for name in ("radius", "object_wave", "background_wave"):
            least, most = getattr(self, name)
            if not 0 < least <= most:
                raise ValueError(f"MovingShapes: {name} must be a range of positive pixels, got {(least, most)}")
        for name in ("object_hue", "background_hue"):
            hue = getattr(self, name)
            if not hue[0] <= hue[1] <= hue[0] + 1:
                raise ValueError(f"MovingShapes: {name} must be a range of at most one turn, got {hue}")
        if not 0 <= self.speed[0] <= self.speed[1]:
            raise ValueError(f"MovingShapes: speed must be a range of pixels per frame, got {self.speed}")

    def batch(self, indices: int | Sequence[int] | Tensor, generator: torch.Generator | None = None) -> Scene:
        """Clips and the truth about them.

        Args:
            indices: which clips; or how many, drawn at random.
            generator: of the random draw.
        """
        if isinstance(indices, int):
            if indices < 0:
                raise ValueError(f"MovingShapes.batch: the number of clips must not be negative, got {indices}")
            indices = torch.randint(2**63 - 1, (indices,), generator=generator)
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1:
            raise ValueError(f"MovingShapes.batch: indices must be a list, got shape {index.shape}")
        draws = self.objects * OBJECT_DRAWS + self.occluders * OCCLUDER_DRAWS + BACKGROUND_DRAWS
        u = uniform(self.seed, index, draws)
        occluder_draws = self.occluders * OCCLUDER_DRAWS
        objects, occluders, background = np.split(u, np.cumsum((self.objects * OBJECT_DRAWS, occluder_draws)), axis=1)
        layers = _stack(
            self._objects(objects.reshape(len(u), self.objects, OBJECT_DRAWS)),
            self._occluders(occluders.reshape(len(u), self.occluders, OCCLUDER_DRAWS)),
        )
        return Scene(self._background(background), layers, self.size)

    def _objects(self, u: Array) -> Layers:
        B, K, _ = u.shape
        H, W = self.size
        half = _between(u[..., 0:2], *self.radius)
        kind = u[..., 2:3]  # a third disks, a third boxes, a third boxes with round corners
        half = np.where(kind < 1 / 3, half[..., :1], half)
        corner = half.min(-1) * np.where(kind < 1 / 3, 1.0, np.where(kind < 2 / 3, 0.0, 0.5))[..., 0]
        heading = 2 * math.pi * u[..., 3]
        velocity = _between(u[..., 4:5], *self.speed) * np.stack((np.cos(heading), np.sin(heading)), -1)
        reach = np.array((W - 1.0, H - 1.0))
        start = u[..., 5:7] * reach  # the middle frame's center
        time = np.arange(self.frames) - (self.frames - 1) / 2
        center = start[:, :, None] + velocity[:, :, None] * time[:, None]
        if self.bounce:
            margin = np.minimum(half, reach / 2)[:, :, None]
            center = margin + _reflect(center - margin, reach - 2 * margin)
        angle = None
        if self.spin:
            angle = 2 * math.pi * u[..., 7:8] + (2 * u[..., 8:9] - 1) * self.spin * time
        hue, other = _hues(u[..., 9], 0.12 + 0.2 * u[..., 10], self.object_hue)
        color = np.stack((_rgb(hue, 0.9, 0.8), _rgb(other, 0.7, 0.35)), -2)
        wave = 2 * math.pi / _between(u[..., 11:13], *self.object_wave)
        return Layers(center, half, corner, color, wave, 2 * math.pi * u[..., 13:15], angle)

    def _occluders(self, u: Array) -> Layers:
        B, K, _ = u.shape
        H, W = self.size
        half = np.stack((_between(u[..., 0], 0.04 * W, 0.1 * W), np.full((B, K), float(H))), -1)
        center = np.stack((u[..., 1] * (W - 1), np.full((B, K), (H - 1) / 2)), -1)
        gray = np.broadcast_to(_between(u[..., 2:3], 0.15, 0.6), (B, K, 3))
        color = np.stack((gray, gray + 0.15), -2)
        wave = 2 * math.pi / _between(u[..., 3:5], 5.0, 10.0)
        phase = 2 * math.pi * u[..., 5:7]
        angle = np.zeros((B, K, self.frames)) if self.spin else None
        still = np.broadcast_to(center[:, :, None], (B, K, self.frames, 2))
        return Layers(still, half, np.zeros((B, K)), color, wave, phase, angle)

    def _background(self, u: Array) -> Background:
        n = BACKGROUND_WAVES
        hue, other = _hues(u[:, 0], 0.3 * u[:, 1], self.background_hue)
        color = np.stack((_rgb(hue, 0.35, 0.25), _rgb(other, 0.35, 0.75)), 1)
        wave = waves(2 * math.pi * u[:, 8 : 8 + n], _between(u[:, 8 + n : 8 + 2 * n], *self.background_wave))
        offset = None
        if self.pan:
            offset = (2 * u[:, None, 2:4] - 1) * self.pan * np.arange(self.frames)[:, None]
        return Background(color, wave, 2 * math.pi * u[:, 8 + 2 * n :], offset)


def uniform(seed: int, indices: Array, draws: int) -> Array:
    """``(len(indices), draws)`` in [0, 1): the same for an index whatever else is asked for.

    Counter-based: the output function of SplitMix64 (Steele et al. 2014) over (seed, index, draw).
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64) + np.uint64(GOLDEN)) ^ indices.astype(np.uint64))
        counter = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = _mix(key[:, None] + counter)
    return (bits >> np.uint64(11)) * 2.0**-53


def waves(heading: Array, length: Array) -> Array:
    """Wave vectors ``(..., 2)``, radians per pixel, from directions in radians and lengths in pixels."""
    return np.stack((np.cos(heading), np.sin(heading)), -1) * (2 * math.pi / length)[..., None]


def _mix(z: Array | np.uint64) -> Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _between(u: Array, least: float, most: float) -> Array:
    return least + (most - least) * u


def _reflect(x: Array, length: Array) -> Array:
    """Positions of a straight path folded into ``[0, length]`` by mirrors at both ends."""
    length = np.maximum(length, 1e-6)
    x = np.remainder(x, 2 * length)
    return np.minimum(x, 2 * length - x)


def _hues(u: Array, apart: Array, hues: tuple[float, float]) -> tuple[Array, Array]:
    """The hues of a texture's two colors, which in a narrow range lie closer together."""
    hue = _between(u, *hues)
    return hue, hue + apart * (hues[1] - hues[0])


def _rgb(hue: Array, saturation: float, value: float) -> Array:
    """``(..., 3)`` in [0, 1] from a hue in turns: three cosines a third of a turn apart."""
    wheel = 0.5 + 0.5 * np.cos(2 * math.pi * (hue[..., None] - np.array((0, 1 / 3, 2 / 3))))
    return value * (1 - saturation + saturation * wheel)


def _stack(first: Layers, second: Layers) -> Layers:
    both = {name: (a, getattr(second, name)) for name, a in vars(first).items()}
    joined: dict[str, Any] = {name: None if a is None else np.concatenate((a, b), 1) for name, (a, b) in both.items()}
    return Layers(**joined)
