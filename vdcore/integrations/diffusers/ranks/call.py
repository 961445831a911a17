"""A call of a model whose clip several processes share: this rank's frames go in, and come out.

Every rank passes the whole clip and gets the whole result, as diffusers' own context parallelism has it and as a
pipeline needs it, whose scheduler steps on the whole; with ``parts`` each passes and gets its frames. Gradients are
those of one process either way, of parameters under the mean over the mesh: what runs on a rank's frames has N times
their share of the gradient, and gradients of inputs are divided by N again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vdcore.integrations.diffusers.clip import Clip, in_scope, watch_of
from vdcore.integrations.diffusers.ranks.mesh import Ranks
from vdcore.integrations.swap import SHARED, host_type
from vdcore.parallel.agreement import agreed
from vdcore.parallel.gradients import everywhere, own_part, scale_gradient
from vdcore.parallel.peers import part_sizes
from vdcore.parallel.switch import gather_along

# Of a tensor, along a dimension with so many steps per frame, this rank's part.
Cut = Callable[[Tensor, int, int], Tensor]


def _nothing(model: Any, given: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Frames:
    """Where frames are in a model's arguments.

    Args:
        clip: the argument that is the clip, which the result is like.
        axis: of its frames.
        per_token: of the model, frames in a token.
        others: from the model, the frames of the whole and the arguments: those besides the clip that have frames, cut.
        check: raises if what blocks rely on is not so.
        along: of tensors among these, the dimension with frames; of one that is not there, it has none.
    """

    clip: str
    axis: int
    per_token: Callable[[Any], int]
    others: Callable[[Any, int, dict[str, Any], Cut], dict[str, Any]]
    along: tuple[tuple[str, int], ...] = ()
    check: Callable[[Any, dict[str, Any]], None] = _nothing


@dataclass(frozen=True)
class OnRanks:
    """The forward of a model on a mesh, around the one that runs on a rank's frames.

    Args:
        inner: that one; None: the host's.
    """

    frames: Frames
    inner: Callable[..., Any] | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        host: Any = host_type(model).forward
        clip: Clip = getattr(model, SHARED)
        given = {**_signature(host).bind(model, *args, **kwargs).arguments}
        given.pop("self")
        _check_dropout(model)
        self.frames.check(model, given)
        whole = self._whole(model, clip, given)
        given = self._cut(model, clip, whole, given)
        shape, each = given[self.frames.clip].shape, self.frames.per_token(model)
        grid = shape[self.frames.axis] // each, *_rows_and_columns(model, shape)
        with in_scope(clip, grid, whole):
            out = (self.inner or host)(model, **given)
        if isinstance(out, str):
            raise RuntimeError(f"swap_in: a call cannot run under {clip.under}: {out}")
        if isinstance(out, tuple):
            return self._result(clip, out[0], whole, each), *out[1:]
        out["sample"] = self._result(clip, out.sample, whole, each)
        return out

    def _whole(self, model: Any, clip: Clip, given: dict[str, Any]) -> int:
        """Token frames of the whole clip, after ranks have told one another that what they pass fits together."""
        name, ranks = self.frames.clip, _ranks(clip)
        x, each = given[name], self.frames.per_token(model)
        if not isinstance(x, Tensor) or x.ndim != 5:
            _wrong(name, "of 5 dimensions", tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__)
        here = x.shape[self.frames.axis]
        if here % each:
            _wrong(name, f"of a multiple of the {each} frames of a token", f"{here} frames")
        peers = ranks.peers
        counted = (here,) * peers.ranks
        if peers.ranks > 1:
            tensors = {n: y if isinstance(y, Tensor) else None for n in _names(model) for y in (given.get(n),)}
            free = {n: dim for n, dim in self.frames.along if (y := tensors[n]) is not None and y.ndim > dim}
            free = {name: self.frames.axis, **free} if ranks.parts else {}
            settings = _settings(model, clip)
            counted = agreed("swap_in", tensors, free, peers, x.device, model, settings).get(name, counted)
        whole = sum(counted) // each if ranks.parts else here // each
        if ranks.parts and counted != tuple(n * each for n in part_sizes(whole, peers.ranks)):
            expected = [n * each for n in part_sizes(whole, peers.ranks)]
            _wrong(name, f"with {expected} frames by rank", [*counted])
        if whole < peers.ranks:
            _wrong(name, f"of at least {peers.ranks} token frames, one for each rank", whole)
        return whole

    def _cut(self, model: Any, clip: Clip, whole: int, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments, of this rank's frames; what backward gives them is right for whoever passed them."""
        ranks, frames = _ranks(clip), self.frames
        if ranks.parts:
            return tree_map(lambda x: scale_gradient(x, 1 / ranks.peers.ranks) if isinstance(x, Tensor) else x, given)

        def cut(x: Tensor, dim: int, each: int) -> Tensor:
            return own_part(x, ranks.peers, dim, each)

        mine = frames.others(model, whole, given, cut)
        mine[frames.clip] = cut(given[frames.clip], frames.axis, frames.per_token(model))
        rest = {name: x for name, x in given.items() if name not in mine}
        return {**tree_map(lambda x: everywhere(x, ranks.peers) if isinstance(x, Tensor) else x, rest), **mine}

    def _result(self, clip: Clip, out: Tensor, whole: int, each: int) -> Tensor:
        ranks = _ranks(clip)
        if ranks.parts:
            return scale_gradient(out, ranks.peers.ranks)
        sizes = tuple(n * each for n in part_sizes(whole, ranks.peers.ranks))
        return gather_along(out, ranks.peers, self.frames.axis, sizes)


@dataclass(frozen=True)
class Served:
    """Another forward of a module that mixes frames: where it would leave a call to the host, there is no such way."""

    function: Callable[..., Any]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = self.function(module, *args, **kwargs)
        if isinstance(out, str):
            raise RuntimeError(f"swap_in: a call cannot run under {getattr(module, SHARED).under}: {out}")
        return out


def served(function: Callable[..., Any], clip: Clip) -> Callable[..., Any]:
    """A module's forward, as it is on one process or on several."""
    return function if clip.ranks is None else Served(function)


def _wrong(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"swap_in: {name} must be {expected}, got {got}")


def _ranks(clip: Clip) -> Ranks:
    assert clip.ranks is not None
    return clip.ranks


def _settings(model: Any, clip: Clip) -> dict[str, Any]:
    """What decides which exchanges a call makes: with another mask ranks would wait for one another, or mix results."""
    watch = watch_of(model)
    assert watch is not None
    given = watch.settings
    return {
        "mask": given.mask,
        "dense_layers": given.dense_layers,
        "plan": _ranks(clip).plan,
        "report.dense()": clip.switch.is_dense,
    }


def _rows_and_columns(model: Any, shape: torch.Size) -> tuple[int, int]:
    """Of tokens, or of a U-Net's latents."""
    patch = getattr(model.config, "patch_size", None) or 1
    rows, columns = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    return shape[-2] // rows, shape[-1] // columns


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _names(model: Any) -> list[str]:
    """Of the arguments of a model, those that may be tensors on every rank."""
    return [name for name in _signature(host_type(model).forward).parameters if name not in ("self", "return_dict")]


def _check_dropout(model: nn.Module) -> None:
    """What is the same on all ranks, a text, say, would be dropped differently by each."""
    if model.training and any(type(m) is nn.Dropout and m.p > 0 and m.training for m in model.modules()):
        raise ValueError("swap_in: dropout must be 0 in training on a mesh, whose ranks draw for themselves")
