"""Layers of moving, textured shapes: drawn anti-aliased, with their motion and occlusion known exactly.

Pixel ``(row i, column j)`` covers the unit square around the point ``(x, y) = (j, i)``. A shape is a rounded box, which
with a corner as round as it is wide is a disk, and turned by 45 degrees a diamond. A pixel shows the box-filtered edge,
``clamp(1/2 - distance)``, of the signed distance to the outline.

In numpy, which uses one thread: these steps are too short to be shared out, and torch would share some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Array = np.ndarray
PIECE = 32768  # pixels drawn together: what lies between two operations stays in a processor's cache
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Arrays:
    """What holds arrays or None for each of B clips: float32, and a slice of the clips has a slice of each."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, None if value is None else np.asarray(value, np.float32))

    def __getitem__(self, clips: slice) -> Self:
        return type(self)(**{name: None if x is None else x[clips] for name, x in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Layers(Arrays):
    """K shapes in each of B clips of T frames, float32; a later one is nearer to the camera.

    Args:
        center: ``(B, K, T, 2)``, pixels, x then y.
        half: ``(B, K, 2)``, half the width and height, pixels.
        corner: ``(B, K)``, radius of the corners, pixels; at most the smaller half.
        color: ``(B, K, 2, 3)``, the two RGB colors in [0, 1] that the texture goes between.
        wave, phase: ``(B, K, 2)``, radians per pixel and radians, of the texture ``1/2 + (sin_x + sin_y) / 4``.
        angle: ``(B, K, T)``, radians, from the x axis towards the y axis; None: nothing is ever turned.
    """

    center: Array
    half: Array
    corner: Array
    color: Array
    wave: Array
    phase: Array
    angle: Array | None = None

    def __post_init__(self) -> None:
        if self.center.ndim != 4 or self.center.shape[-1] != 2:
            raise ValueError(f"Layers: center must be (B, K, T, 2), got {self.center.shape}")
        B, K, T, _ = self.center.shape
        shapes: dict[str, tuple[int, ...]] = {
            "half": (B, K, 2),
            "corner": (B, K),
            "color": (B, K, 2, 3),
            "wave": (B, K, 2),
            "phase": (B, K, 2),
            "angle": (B, K, T),
        }
        for name, expected in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != expected:
                raise ValueError(f"Layers: {name} must be {expected}, got {value.shape}")
        super().__post_init__()

    @property
    def count(self) -> int:
        return self.center.shape[1]

    def local(self, x: Array, y: Array, k: int, frames: slice = ALL) -> tuple[Array, Array]:
        """Points as layer k has them, from its center and turned back; x and y broadcast to ``(B, T, H, W)``."""
        x = x - self.center[:, k, frames, 0, None, None]
        y = y - self.center[:, k, frames, 1, None, None]
        return (x, y) if self.angle is None else _turn(x, y, -self.angle[:, k, frames, None, None])

    def distance(self, x: Array, y: Array, k: int) -> Array:
        """Signed distance of local points to layer k's outline, pixels, negative inside."""
        half, corner = self.half[:, k, :, None, None, None], self.corner[:, k, None, None, None]
        x, y = np.abs(x) - (half[:, 0] - corner), np.abs(y) - (half[:, 1] - corner)
        # While nothing is turned x is one row and y one column: only from here on are steps the size of the picture.
        distance = np.square(np.maximum(x, 0)) + np.square(np.maximum(y, 0))
        np.sqrt(distance, out=distance)
        distance += np.minimum(np.maximum(x, y), 0)
        distance -= corner
        return distance

    def texture(self, x: Array, y: Array, k: int) -> Array:
        """Share of the second color at local points, in [0, 1]."""
        wave, phase = self.wave[:, k, :, None, None, None], self.phase[:, k, :, None, None, None]
        quarter = np.float32(0.25)
        return (quarter * np.sin(x * wave[:, 0] + phase[:, 0]) + 0.5) + quarter * np.sin(y * wave[:, 1] + phase[:, 1])


@dataclass(frozen=True, eq=False)
class Background(Arrays):
    """A texture behind all layers, ``1/2 + mean_n sin(wave_n . p + phase_n) / 2`` between two colors, float32.

    Args:
        color: ``(B, 2, 3)``.
        wave: ``(B, n, 2)``, radians per pixel.
        phase: ``(B, n)``, radians.
        offset: ``(B, T, 2)``, pixels by which it has moved in a frame; None: it stands still.
    """

    color: Array
    wave: Array
    phase: Array
    offset: Array | None = None

    def texture(self, x: Array, y: Array, frames: slice = ALL) -> Array:
        """Share of the second color at points, ``(B, T or 1, H, W)``."""
        if self.offset is not None:
            x, y = x - self.offset[:, frames, 0, None, None], y - self.offset[:, frames, 1, None, None]
        n = self.wave.shape[1]
        share = np.float32(0.5)
        for i in range(n):
            wave, phase = self.wave[:, i, :, None, None, None], self.phase[:, i, None, None, None]
            share = share + np.float32(0.5 / n) * np.sin(x * wave[:, 0] + (y * wave[:, 1] + phase))
        return np.asarray(share)


@dataclass(frozen=True, eq=False)
class Scene:
    """Clips and the truth about them; each is drawn or worked out when it is first asked for.

    What is the truth about a pixel is the truth about the point at its center.
    """

    background: Background
    layers: Layers
    size: tuple[int, int]

    @property
    def frames(self) -> int:
        return self.layers.center.shape[2]

    def __len__(self) -> int:
        return len(self.layers.center)

    @cached_property
    def video(self) -> Tensor:
        """``(B, 3, T, H, W)``, float32 in [0, 1]."""
        H, W = self.size
        video = np.empty((len(self), 3, self.frames, H, W), np.float32)
        frames_at_once = min(max(PIECE // (H * W), 1), max(self.frames, 1))
        clips_at_once = max(PIECE // (frames_at_once * H * W), 1)
        for i in range(0, len(self), clips_at_once):
            clips = slice(i, i + clips_at_once)
            background, layers = self.background[clips], self.layers[clips]
            for t in range(0, self.frames, frames_at_once):
                frames = slice(t, t + frames_at_once)
                _draw(background, layers, *self._grid, frames, video[clips, :, frames])
        return torch.from_numpy(video)

    @cached_property
    def top(self) -> Tensor:
        """``(B, T, H, W)`` int8: the nearest layer that covers a pixel, from 1; 0 is the background."""
        return torch.from_numpy(self._top(*self._grid, ALL))

    @cached_property
    def flow(self) -> Tensor:
        """``(B, T-1, 2, H, W)``, pixels, x then y: where the point seen in frame t has gone in frame t+1."""
        return torch.from_numpy(self._flow(slice(None, -1), slice(1, None)))

    @cached_property
    def flow_back(self) -> Tensor:
        """``(B, T-1, 2, H, W)``: where the point seen in frame t+1 has come from in frame t."""
        return torch.from_numpy(self._flow(slice(1, None), slice(None, -1)))

    @cached_property
    def occluded(self) -> Tensor:
        """``(B, T-1, H, W)`` bool: the point seen in frame t is hidden, or out of the picture, in frame t+1."""
        return torch.from_numpy(self._lost(self.flow.numpy(), slice(None, -1), slice(1, None)))

    @cached_property
    def disoccluded(self) -> Tensor:
        """``(B, T-1, H, W)`` bool: the point seen in frame t+1 was hidden, or out of the picture, in frame t."""
        return torch.from_numpy(self._lost(self.flow_back.numpy(), slice(1, None), slice(None, -1)))

    def visible_share(self, layer: int) -> Tensor:
        """``(B, T)``, the share of layer ``layer`` (from 1) that is in sight: pixels it is seen in over its area."""
        if not 1 <= layer <= self.layers.count:
            raise ValueError(f"Scene.visible_share: layer must be 1 to {self.layers.count}, got {layer}")
        half, corner = self.layers.half[:, layer - 1], self.layers.corner[:, layer - 1]
        area = torch.from_numpy(4 * half.prod(-1) - (4 - np.pi) * corner**2)
        return ((self.top == layer).flatten(2).sum(-1) / area[:, None]).clamp(max=1)

    @cached_property
    def _grid(self) -> tuple[Array, Array]:
        """Columns ``(1, 1, 1, W)`` and rows ``(1, 1, H, 1)``."""
        H, W = self.size
        return np.arange(W, dtype=np.float32).reshape(1, 1, 1, W), np.arange(H, dtype=np.float32).reshape(1, 1, H, 1)

    def _top(self, x: Array, y: Array, frames: slice) -> Array:
        shape = (len(self), len(range(self.frames)[frames]), *self.size)
        top = np.zeros(shape, np.int8)
        for k in range(self.layers.count):
            inside = self.layers.distance(*self.layers.local(x, y, k, frames), k) < 0
            np.copyto(top, np.int8(k + 1), where=inside)
        return top

    def _flow(self, here: slice, there: slice) -> Array:
        top = self.top.numpy()[:, here]
        flow = np.zeros((*top.shape[:2], 2, *top.shape[2:]), np.float32)
        offset = self.background.offset
        if offset is not None:
            flow += (offset[:, there] - offset[:, here])[..., None, None]
        for k in range(self.layers.count):
            np.copyto(flow, self._moved(k, here, there), where=(top == k + 1)[:, :, None])
        return flow

    def _moved(self, k: int, here: slice, there: slice) -> Array:
        """``(B, T-1, 2, H or 1, W or 1)``: displacement of points of layer k."""
        center, angle = self.layers.center[:, k], self.layers.angle
        step = (center[:, there] - center[:, here])[..., None, None]
        if angle is None:
            return step
        x, y = (points - center[:, here, i, None, None] for i, points in enumerate(self._grid))
        turned = _turn(x, y, (angle[:, k, there] - angle[:, k, here])[..., None, None])
        return np.stack((turned[0] - x, turned[1] - y), 2) + step

    def _lost(self, flow: Array, here: slice, there: slice) -> Array:
        x, y = self._grid
        H, W = self.size
        x, y = x + flow[:, :, 0], y + flow[:, :, 1]
        outside = (x < -0.5) | (x > W - 0.5) | (y < -0.5) | (y > H - 0.5)
        return outside | (self._top(x, y, there) != self.top.numpy()[:, here])


def _turn(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _draw(background: Background, layers: Layers, x: Array, y: Array, frames: slice, out: Array) -> None:
    """Into ``(B, 3, T, H, W)``."""
    share = background.texture(x, y, frames)
    for c in range(3):
        first, second = background.color[:, :, c, None, None, None].swapaxes(0, 1)
        out[:, c] = first + (second - first) * share
    for k in range(layers.count):
        points = layers.local(x, y, k, frames)
        cover = np.float32(0.5) - layers.distance(*points, k)
        np.clip(cover, 0, 1, out=cover)
        bare = 1 - cover  # exactly 0 or 1 away from edges: what is covered leaves no trace, not in the last bit
        share = layers.texture(*points, k)
        for c in range(3):
            first, second = layers.color[:, k, :, c, None, None, None].swapaxes(0, 1)
            color = share * (second - first)
            color += first
            color *= cover
            out[:, c] *= bare
            out[:, c] += color
