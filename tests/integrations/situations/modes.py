"""Modes, sizes and masks."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from host_runs import MODELS, output
from torch import Tensor, nn

from situations.entry import Arrange, Call, plainly, situation

# ---- Modes ----


@situation("inference mode")
def inference_mode(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        with torch.inference_mode():
            return [output(model(**MODELS[name].arguments())).clone() for _ in range(2)]

    return call


@situation("a default device")
def default_device(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        before = torch.get_default_device()
        torch.set_default_device("cpu")
        try:
            return plainly(model, name)()
        finally:
            torch.set_default_device(None if before == torch.device("cpu") else before)

    return call


class Doubling(torch.overrides.TorchFunctionMode):
    """Attention twice as large: what somebody does who takes torch's functions over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.scaled_dot_product_attention else out


@situation("a function mode")
def function_mode(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        with Doubling():
            return plainly(model, name)()

    return call


@situation("autocast", costly=True)
def autocast(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [x.float() for x in plainly(model, name)()]

    return call


@situation("deterministic algorithms", costly=True)
def deterministic(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        torch.use_deterministic_algorithms(True)
        try:
            return plainly(model, name)()
        finally:
            torch.use_deterministic_algorithms(False)

    return call


@situation("tasks of one thread", costly=True)
def tasks(model: Any, name: str) -> Call:
    async def one() -> list[Tensor]:
        await asyncio.sleep(0)
        return plainly(model, name)()

    async def all_of_them() -> list[list[Tensor]]:
        return await asyncio.gather(*(one() for _ in range(3)))

    return lambda: [x for found in asyncio.run(all_of_them()) for x in found]


# ---- Sizes and masks ----


@contextmanager
def sized(**sizes: int) -> Iterator[None]:
    """Inputs of the tiny models are of other sizes: T frames, H rows, W columns."""
    modules = [sys.modules[f"zoo.{name}"] for name in ("tiny", "factorized", "full", "joint")]
    found = [(module, name, getattr(module, name)) for module in modules for name in sizes if hasattr(module, name)]
    try:
        for module, name, _ in found:
            setattr(module, name, sizes[name])
        yield
    finally:
        for module, name, size in found:
            setattr(module, name, size)


def of_size(**sizes: int) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        def call() -> list[Tensor]:
            with sized(**sizes):
                return plainly(model, name)()

        return call

    return arrange


situation("one frame", costly=True)(of_size(T=1))
situation("seven frames", costly=True)(of_size(T=7))


def with_inputs(change: Callable[[Tensor], Tensor]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        def call() -> list[Tensor]:
            given = MODELS[name].arguments()
            whole = {key: isinstance(x, Tensor) and x.ndim > 1 and x.is_floating_point() for key, x in given.items()}
            with torch.no_grad():
                return [output(model(**{key: change(x) if whole[key] else x for key, x in given.items()}))]

        return call

    return arrange


situation("inputs that lie otherwise", costly=True)(
    with_inputs(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
)
situation("inputs without memory of their own", costly=True)(with_inputs(lambda x: x[:1].expand_as(x)))
situation("inputs that are parameters", costly=True)(with_inputs(lambda x: nn.Parameter(x)))


def of_one(*starts: str) -> Arrange:
    """Inputs whose names start so are of one sample, for a batch of others."""

    def arrange(model: Any, name: str) -> Call:
        def call() -> list[Tensor]:
            given = MODELS[name].arguments()
            with torch.no_grad():
                return [output(model(**{key: x[:1] if key.startswith(starts) else x for key, x in given.items()}))]

        return call

    return arrange


situation("one timestep for all", costly=True)(of_one("timestep"))
situation("one text for all", costly=True)(of_one("encoder_", "pooled_"))


@situation("two resolutions")
def two_resolutions(model: Any, name: str) -> Call:
    def call() -> list[Tensor]:
        seen = []
        for width in (6, 10, 6):
            with sized(W=width):
                seen += plainly(model, name)()
        return seen

    return call


def masks(rows: list[list[int]]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        def call() -> list[Tensor]:
            given = MODELS[name].arguments()
            mask = given["encoder_attention_mask"]
            given["encoder_attention_mask"] = torch.tensor(rows, dtype=mask.dtype)
            with torch.no_grad():
                return [output(model(**given))]

        return call

    return arrange


MASKS = {
    "an empty text": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    "a text padded on the left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "a text with holes": [[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]],
}
for _name, _rows in MASKS.items():
    situation(_name)(masks(_rows))
