"""When the mask of a swapped model is in force: not inside ``report.dense()``, nor in the first steps of a pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from types import new_class
from typing import Any
from weakref import ref

import torch

from vdcore.integrations.swap import MadeAtRunTime

_dense: ContextVar[tuple[Switch, ...]] = ContextVar("vdcore.integrations.diffusers.dense", default=())
_lock = threading.Lock()


class Switch:
    """Of one model.

    Attributes:
        depth: blocks of ``report.dense()`` that are open, in any thread: what compiled code looks at.
        steps: those of a pipeline's scheduler, the first of which are dense.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.steps: Steps | None = None

    @property
    def is_dense(self) -> bool:
        """All layers see everything in what is called here and now."""
        if self.steps is not None and self.steps.are_dense:
            return True
        return self.depth > 0 if torch.compiler.is_compiling() else self in _dense.get()

    def check(self) -> None:
        """The steps that are counted are still the pipeline's."""
        if self.steps is not None:
            self.steps.check()


@contextmanager
def dense(switches: Sequence[Switch]) -> Iterator[None]:
    """Inside, in this thread, all layers of these models see everything."""
    token = _dense.set((*_dense.get(), *switches))
    _deepen(switches, 1)
    try:
        yield
    finally:
        _deepen(switches, -1)
        _dense.reset(token)


def _deepen(switches: Sequence[Switch], by: int) -> None:
    with _lock:
        for switch in switches:
            switch.depth += by


# ---- Steps of a pipeline ----

STEPS = "vdcore_steps"  # the name of its steps in a scheduler


class Steps:
    """The steps that a pipeline's scheduler has taken since it was given its timesteps.

    Args:
        first: steps that are dense.
        pipeline: whose scheduler it is.
    """

    def __init__(self, first: int, pipeline: Any) -> None:
        self.first, self.taken = first, 0
        self.are_dense = first > 0
        self._pipeline: ref[Any] | None = ref(pipeline)

    def count(self, taken: int) -> None:
        self.taken = taken
        self.are_dense = taken < self.first

    def check(self) -> None:
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is not None and getattr(scheduler_of(pipeline), STEPS, None) is not self:
            raise RuntimeError(
                "swap_in: the pipeline's scheduler was replaced since the swap, so that dense_steps are not counted: "
                "swap in again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}  # a copy's pipeline is another


class _Counted(MadeAtRunTime):
    """Base of the classes that take the place of a scheduler's, and count its steps."""


@lru_cache(maxsize=256)
def _counted_class(host: Any) -> Any:
    @wraps(host.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[STEPS].count(0)
        return host.set_timesteps(self, *args, **kwargs)

    @wraps(host.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = host.step(self, *args, **kwargs)
        steps = self.__dict__[STEPS]
        steps.count(steps.taken + 1)
        return result

    names: dict[str, Any] = {
        "set_timesteps": set_timesteps,
        "step": step,
        "MADE_BY": (_counted_class, (host,)),
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
    }
    return new_class(host.__name__, (_Counted, host), {}, lambda space: space.update(names))


def scheduler_of(pipeline: Any) -> Any:
    """The scheduler that a pipeline steps with; None if it has none."""
    return pipeline.components.get("scheduler")


def count_steps(pipeline: Any, first: int) -> Steps:
    """Has the pipeline's scheduler count its steps from now on."""
    scheduler = scheduler_of(pipeline)
    if not all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step")):
        kind = type(pipeline).__name__
        raise ValueError(f"swap_in: dense_steps must be 0 for {kind}, which has no scheduler with steps, got {first}")
    known = scheduler.__dict__.get(STEPS)
    if isinstance(scheduler, _Counted) and known is not None and known.first == first:
        return known  # it may be in the middle of a clip
    forget_steps(pipeline)
    steps = Steps(first, pipeline)
    scheduler.__dict__[STEPS] = steps
    host: Any = type(scheduler)
    scheduler.__class__ = _counted_class(host)
    return steps


def forget_steps(pipeline: Any) -> None:
    """Undoes :func:`count_steps`."""
    scheduler = scheduler_of(pipeline)
    if isinstance(scheduler, _Counted):
        scheduler.__class__ = type(scheduler).MADE_BY[1][0]
        scheduler.__dict__.pop(STEPS, None)
