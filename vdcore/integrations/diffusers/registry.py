"""Which function or class serves which class of diffusers: each file of ``families`` enters its own here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import nn

from vdcore.integrations.diffusers.clip import Clip, Grid
from vdcore.integrations.swap import MADE, Change

try:
    from diffusers.hooks import _helpers as host_tables
except ImportError:  # before diffusers had them
    host_tables: Any = None  # type: ignore[no-redef]

Entered = TypeVar("Entered")
Axes = tuple[int, int, int]


class Forward(NamedTuple):
    """Another forward of a module, as :func:`vdcore.integrations.swap.served_class` takes it."""

    function: Callable[..., Any]
    serves: str
    relies: tuple[Callable[..., Any], ...]


# Processors of full-3D models, with the class whose norms and rotations are theirs.
PROCESSORS: dict[type, Any] = {}
# Modules with another forward.
FORWARDS: dict[type[nn.Module], Forward] = {}
# Modules that are served as a whole, with all the attention in their temporal blocks.
FACTORIZED: dict[type[nn.Module], Callable[[Any, Clip], list[Change] | str]] = {}
# Models whose attention runs over all frames, and which a mask can therefore restrict: the axes of frames, rows and
# columns of their input; None for packed tokens, whose grid is named by the call.
GRIDS: dict[type[nn.Module], Axes | None] = {}


def processor(*hosts: type) -> Callable[[Entered], Entered]:
    return _enter(PROCESSORS, hosts, lambda served: served)


def factorized(*hosts: type[nn.Module]) -> Callable[[Entered], Entered]:
    return _enter(FACTORIZED, hosts, lambda plan: plan)


def forward(
    *hosts: type[nn.Module], serves: str, relies: tuple[Callable[..., Any], ...] = ()
) -> Callable[[Entered], Entered]:
    """
    Args:
        serves: the operators in it, for the report.
        relies: what else of the host it relies on.
    """
    return _enter(FORWARDS, hosts, lambda function: Forward(function, serves, relies))


def _enter(table: dict[Any, Any], hosts: tuple[type, ...], entry: Callable[[Any], Any]) -> Callable[[Entered], Entered]:
    def enter(what: Entered) -> Entered:
        table.update(dict.fromkeys(hosts, entry(what)))
        return what

    return enter


def _tell_host(made: type, host: type) -> None:
    """What diffusers knows of a class of blocks, it knows of the one in its place: caches and layer skipping ask."""
    if host_tables is None:
        return
    try:
        known = host_tables.TransformerBlockRegistry.get(host)
    except ValueError:
        return
    host_tables.TransformerBlockRegistry.register(made, replace(known))


MADE.append(_tell_host)


def grid(*models: type[nn.Module], axes: Axes | None) -> None:
    GRIDS.update(dict.fromkeys(models, axes))


def grid_of(axes: Axes | None, model: Any, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Grid:
    """Frames, rows and columns of patches in a call of a model with these axes."""
    if axes is None:
        T, H, W = (kwargs.get(name) for name in ("num_frames", "height", "width"))
        if not (isinstance(T, int) and isinstance(H, int) and isinstance(W, int)):
            given = (T, H, W)
            raise ValueError(f"swap_in: num_frames, height and width must be given by name under a mask, got {given}")
        return T, H, W
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    T, H, W = (hidden_states.shape[axis] // p for axis, p in zip(axes, patch))
    return T, H, W
