"""What a file of ``families`` says of its models, and the grids of tokens of models that a mask can restrict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from vdcore.integrations.diffusers.clip import Clip, Grid
from vdcore.integrations.diffusers.fused import Fused
from vdcore.integrations.swap import Change

Plan = Callable[[Any, Clip], "list[Change] | str"]


class Forward(NamedTuple):
    """Another forward of a module.

    Args:
        function: as :func:`vdcore.integrations.swap.served_class` takes it.
        serves: the operators in it, for the report.
        relies: what else of the host it relies on.
    """

    function: Callable[..., Any]
    serves: str
    relies: tuple[Callable[..., Any], ...] = ()


@dataclass(frozen=True)
class Family:
    """By the classes of diffusers.

    Args:
        processors: of full-3D models, each with the class whose norms and rotations are theirs.
        forwards: of modules that have another forward.
        factorized: modules that are served as a whole, with all the attention in their temporal blocks.
        grids: of models whose attention runs over all frames, and which a mask can therefore restrict; from the
            arguments of the model's forward.
    """

    processors: Mapping[type, type[Fused]] = field(default_factory=dict)
    forwards: Mapping[type[nn.Module], Forward] = field(default_factory=dict)
    factorized: Mapping[type[nn.Module], Plan] = field(default_factory=dict)
    grids: Mapping[type[nn.Module], Callable[..., Grid]] = field(default_factory=dict)


def _grid(video: tuple[int, ...], model: Any) -> Grid:
    """Frames, rows and columns of patches."""
    config = model.config
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    T, H, W = (n // p for n, p in zip(video, patch))
    return T, H, W


def channels_first(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, C, T, H, W)``."""
    return _grid(hidden_states.shape[2:], model)


def frames_first(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, T, C, H, W)``."""
    B, T, C, H, W = hidden_states.shape
    return _grid((T, H, W), model)


def channels_last(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Grid:
    """Of ``(B, T, H, W, C)``."""
    return _grid(hidden_states.shape[1:4], model)


def packed(model: Any, *args: Any, **kwargs: Any) -> Grid:
    """Of tokens ``(B, N, C)``, whose grid is named by the call."""
    grid = tuple(kwargs.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(n, int) for n in grid):
        raise ValueError(f"swap_in: num_frames, height and width must be given by name under a mask, got {grid}")
    return grid  # type: ignore[return-value]
