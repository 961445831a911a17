"""What a mask would cost the picture: how much of a model's attention it keeps, by layer and head.

    report = measure_masks(model, inputs)
    print(report)
    swap_in(model, mask=report.recommended(keep=0.95))

The share of a query's softmax that a mask keeps is ``exp(lse under the mask - lse of all)``, exactly.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.grid_mask import GridMask
from vdcore.integrations.mask_names import Grid, One, candidates, parse_mask
from vdcore.mask import FrameMask
from vdcore.models import VDiT
from vdcore.models.attention import FullAttention

DENSE = "dense"
WORST = 0.01  # of the queries keep less than what is called the worst


@dataclass(frozen=True)
class Kept:
    """One mask in one head of one layer.

    Args:
        call: of the model, counted from 0.
        density: visible pairs over all pairs of video tokens.
        mass: share of the softmax that is kept, the mean over queries.
        worst: what all but a hundredth of the queries keep.
        error: norm of the change of the head's output over the norm of that output.
    """

    layer: str
    call: int
    head: int
    mask: str
    density: float
    mass: float
    worst: float
    error: float


@dataclass
class MaskReport:
    """What :func:`measure_masks` found.

    Args:
        grid: frames, rows and columns of tokens.
        masks: by name.
        kept: every mask in every head.
        seconds: of a layer's attention by (layer, mask), ``"dense"`` among the masks; empty if not timed.
        heads: key heads of every layer, and query heads to each.
        query_frames: frames whose queries were judged.
    """

    grid: Grid = (0, 0, 0)
    masks: dict[str, One] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    query_frames: tuple[int, ...] = ()

    @property
    def layers(self) -> list[str]:
        return list(self.heads)

    def of(self, mask: str) -> list[Kept]:
        return [kept for kept in self.kept if kept.mask == mask]

    def cost(self, mask: str) -> float:
        """Over dense: seconds in all layers, or visible pairs where nothing was timed."""
        if mask == DENSE:
            return 1.0
        if not self.seconds:
            return statistics.fmean(kept.density for kept in self.of(mask))
        of_mask, dense = (sum(self.seconds[layer, name] for layer in self.layers) for name in (mask, DENSE))
        return of_mask / dense

    def choices(self, keep: float = 0.95) -> dict[str, list[str]]:
        """By layer, for every query head the cheapest mask that keeps so much of its softmax in every call.

        Query heads that share keys get one mask. ``"dense"``: none does, or none that hides something and is cheaper.
        """
        hiding = [name for name in self.masks if any(kept.density < 1 for kept in self.of(name))]
        by_cost = sorted((self.cost(name), name) for name in hiding)
        least: dict[tuple[str, int, str], float] = {}
        for kept in self.kept:
            key = kept.layer, kept.head, kept.mask
            least[key] = min(kept.mass, least.get(key, math.inf))
        found: dict[str, list[str]] = {}
        for layer, (count, shared) in self.heads.items():
            found[layer] = []
            for first in range(0, count * shared, shared):
                heads = range(first, first + shared)
                fits = (n for cost, n in by_cost if cost < 1 and all(least[layer, h, n] >= keep for h in heads))
                found[layer] += [next(fits, DENSE)] * shared
        return found

    def recommended(self, keep: float = 0.95) -> dict[int | str, Any]:
        """The same as ``swap_in`` takes it: by layer, pairs of a number of heads and their mask; None: dense."""
        found: dict[int | str, Any] = {}
        for layer, names in self.choices(keep).items():
            runs = [(len(list(run)), name) for name, run in groupby(names)]
            pairs = tuple((count, self.masks.get(name, FrameMask.full())) for count, name in runs)
            found[layer] = None if set(names) == {DENSE} else pairs if len(pairs) > 1 else pairs[0][1]
        return found

    def saving(self, keep: float = 0.95) -> float:
        """Cost of attention under the recommended masks over dense attention's, every head counting the same."""
        costs = {name: self.cost(name) for name in (*self.masks, DENSE)}
        names = [name for of_layer in self.choices(keep).values() for name in of_layer]
        return statistics.fmean(costs[name] for name in names)

    def __str__(self) -> str:
        T, rows, columns = self.grid
        lines = [f"{len(self.layers)} layers, {T} frames of {rows} x {columns} tokens"]
        width = max(map(len, self.masks), default=0)
        lines.append(f"{'mask':{width}}  density   cost   kept  least head  worst 1%  error")
        for name in sorted(self.masks, key=self.cost):
            of = self.of(name)
            mean, error = (statistics.fmean(numbers) for numbers in zip(*((x.mass, x.error) for x in of)))
            least, worst = min(x.mass for x in of), min(x.worst for x in of)
            numbers = f"{of[0].density:7.1%}  {self.cost(name):5.2f}  {mean:5.3f}  {least:10.3f}  {worst:8.3f}"
            lines.append(f"{name:{width}}  {numbers}  {error:5.3f}")
        counts = Counter(name for names in self.choices().values() for name in names)
        share = ", ".join(f"{n} x {name}" for name, n in counts.most_common())
        lines.append(f"for 95 % in every head: {share}; attention costs {self.saving():.2f} of dense")
        return "\n".join(lines)


class _Enough(Exception):
    """All calls that are to be judged have been."""


def measure_masks(
    model_or_pipeline: Any,
    run: Mapping[str, Any] | Callable[[], Any],
    masks: Sequence[str] | Mapping[str, One] | None = None,
    *,
    calls: Collection[int] = (0,),
    query_frames: int | None = None,
    rounds: int = 3,
    on_layer: Callable[[str], None] = lambda layer: None,
) -> MaskReport:
    """Runs a model once, dense, and judges masks on the queries and keys of every layer.

    Layers are judged one by one while the model runs: beside its own memory this takes that of one layer's queries,
    keys and values and of two results. Under a text that joins the sequence, the text's keys are part of the softmax,
    and always visible. A swapped model is swapped afterwards as it was before.

    Args:
        model_or_pipeline: a full 3D model of diffusers, or a pipeline with one, swapped in or not; or a VDiT with full
            attention, trained without a mask.
        run: the arguments of the model's forward by name, or a function that calls the model or the pipeline.
        masks: names (see :mod:`vdcore.integrations.mask_names`), or masks by names of your own; None: some of every
            kind, by the grid.
        calls: of the model, counted from 0, that are judged: what is kept differs from step to step.
        query_frames: judge the queries of so many frames alone, evenly spread; None: all.
        rounds: that masks are timed in; 0: they are not.
        on_layer: called with the name of a layer before it is judged.

    Raises:
        ValueError: if the model has no full 3D attention, or its grid is not known, or a mask has no such name.
    """
    judge = _Judge(masks, frozenset(calls), query_frames, rounds, on_layer)
    if not judge.calls or min(judge.calls) < 0:
        raise ValueError(f"measure_masks: calls must be numbers of at least 0, one or more, got {tuple(calls)}")
    call: Callable[[], Any] = run if callable(run) else lambda: model_or_pipeline(**run)
    with torch.no_grad(), _probed(model_or_pipeline, judge), suppress(_Enough):
        call()
    if not judge.report.kept:
        kind = type(model_or_pipeline).__name__
        what = f"its {max(judge.seen.values())} calls" if judge.seen else "a model with attention over all frames"
        raise ValueError(f"measure_masks: calls must be of {what}, got {tuple(calls)} of {kind}")
    return judge.report


def _probed(model_or_pipeline: Any, probe: Callable[..., None]) -> AbstractContextManager[Any]:
    if isinstance(model_or_pipeline, VDiT):
        return _probed_vdit(model_or_pipeline, probe)
    made: AbstractContextManager[Any] = importlib.import_module("vdcore.integrations.diffusers.probe").probed(
        model_or_pipeline, probe
    )
    return made


@contextmanager
def _probed_vdit(model: VDiT, probe: Callable[..., None]) -> Iterator[None]:
    if model.config.mask != FrameMask.full():
        raise ValueError(f"measure_masks: the model must be one without a mask, got {model.config.mask}")
    if model.config.attention != "full":
        raise ValueError(f"measure_masks: the model must have full attention, got {model.config.attention}")

    def look(name: str) -> Callable[[FullAttention, tuple[Any, ...]], None]:
        def hook(layer: FullAttention, args: tuple[Any, ...]) -> None:
            x, context = args[:2]
            if context.split is not None:
                raise ValueError("measure_masks: the model must be one of one process, got one with a mesh")
            rest = {"norm": layer.norm(), "rope": context.rotations.full}
            probe(name, *layer.split(layer.qkv(x)), context.grid[1:], rest)

        return hook

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FullAttention)]
    handles = [module.register_forward_pre_hook(look(name)) for name, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Judge:
    """Is shown every layer's attention, and fills a report."""

    def __init__(
        self,
        masks: Sequence[str] | Mapping[str, One] | None,
        calls: frozenset[int],
        query_frames: int | None,
        rounds: int,
        on_layer: Callable[[str], None],
    ) -> None:
        self.given, self.calls, self.query_frames = masks, calls, query_frames
        self.rounds, self.on_layer = rounds, on_layer
        self.report, self.seen = MaskReport(), Counter[str]()

    def __call__(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], rest: dict[str, Any]
    ) -> None:
        call = self.seen[layer]
        self.seen[layer] += 1
        if call > max(self.calls):
            raise _Enough
        if call in self.calls:
            self.on_layer(layer)
            self.judge(layer, call, q, k, v, (q.shape[1], *size), rest)

    def judge(self, layer: str, call: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid, rest: dict[str, Any]) -> None:
        self.prepare(grid)
        rest = dict(rest)
        norm, rope = rest.pop("norm", None), rest.pop("rope", None)
        if norm is not None or rope is not None:
            q, k = vdcore.qk_norm_rope(q, k, norm=norm, rope=rope)
        attention = _Attention(q, k, v, grid, self.report.query_frames, rest)
        self.report.heads[layer] = (k.shape[3], q.shape[3] // k.shape[3])
        dense, whole = attention(FrameMask.full())
        size = dense.float().square().sum((0, 1, 2, 4)).sqrt()
        for name, mask in self.report.masks.items():
            out, lse = attention(mask)
            mass = torch.exp(lse - whole).flatten(0, 2)  # (queries, H)
            worst = mass.kthvalue(max(math.ceil(WORST * len(mass)), 1), 0).values
            error = (out.float() - dense.float()).square().sum((0, 1, 2, 4)).sqrt() / size
            density = attention.density(mask)
            numbers = zip(mass.mean(0).tolist(), worst.tolist(), error.tolist())
            self.report.kept += [Kept(layer, call, h, name, density, *found) for h, found in enumerate(numbers)]
        if self.rounds:
            self.time(layer, attention)

    def prepare(self, grid: Grid) -> None:
        report = self.report
        if report.masks and report.grid != grid:
            raise ValueError(f"measure_masks: calls must be of clips of one grid, got {report.grid} and {grid}")
        if report.masks:
            return
        given = candidates(grid) if self.given is None else self.given
        named = isinstance(given, Mapping)
        report.masks = dict(given) if isinstance(given, Mapping) else {name: parse_mask(name, grid) for name in given}
        if not named:
            report.masks.pop(DENSE, None)  # which all are held against
        if not report.masks or DENSE in report.masks:
            raise ValueError(f"measure_masks: masks must be one or more, none of them called {DENSE!r}")
        report.grid, T = grid, grid[0]
        count = T if self.query_frames is None else min(max(self.query_frames, 1), T)
        report.query_frames = tuple(dict.fromkeys((2 * i + 1) * T // (2 * count) for i in range(count)))

    def time(self, layer: str, attention: _Attention) -> None:
        """The median of each mask, by turns."""
        masks: dict[str, One] = {DENSE: FrameMask.full(), **self.report.masks}
        found: dict[str, list[float]] = {name: [] for name in masks}
        for _ in range(self.rounds):
            for name, mask in masks.items():
                _synchronize(attention.q)
                start = time.perf_counter()
                for first, last in attention.parts:
                    attention.part(mask, first, last)
                _synchronize(attention.q)
                found[name].append(time.perf_counter() - start)
        for name, seconds in found.items():
            known = self.report.seconds.get((layer, name), 0.0)
            self.report.seconds[layer, name] = known + statistics.median(seconds)


@dataclass
class _Attention:
    """A layer's attention under any mask, of the queries that are judged."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid
    query_frames: tuple[int, ...]
    rest: dict[str, Any]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Query frames from and to, in one call where they are all."""
        T = self.grid[0]
        return [(0, T)] if len(self.query_frames) == T else [(t, t + 1) for t in self.query_frames]

    def __call__(self, mask: One) -> tuple[Tensor, Tensor]:
        """Results ``(B, T, S, H, D)`` and lse ``(B, T, S, H)`` of the video's queries."""
        found = [self.part(mask, first, last, return_lse=True) for first, last in self.parts]
        if "text" in self.rest:
            found = [(of_video, lse) for (of_video, _), (lse, _) in found]
        out, lse = (torch.cat(parts, 1) for parts in zip(*found))
        return out, lse

    def part(self, mask: One, first: int, last: int, return_lse: bool = False) -> Any:
        given: dict[str, Any] = {"grid": self.grid[1:]} if isinstance(mask, GridMask) else {}
        given |= {**self.rest, "mask": mask, "q_start": first, "return_lse": return_lse}
        return vdcore.video_attention(self.q[:, first:last], self.k, self.v, **given)

    def density(self, mask: One) -> float:
        T, rows, columns = self.grid
        shares = []
        for first, last in self.parts:
            in_frames = isinstance(mask, FrameMask)
            given: Any = (last - first, T, first) if in_frames else (last - first, rows, columns, T, first)
            shares.append(mask.density(*given))
        return statistics.fmean(shares)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
