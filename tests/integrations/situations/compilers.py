"""Compilers, exporters and tracers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from host_runs import MODELS, output
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from situations.entry import Arrange, Call, plainly, situation
from situations.gradients import training
from situations.modes import MASKS, masks


def compiled(*, already_run: bool = False, **options: Any) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        torch.compiler.reset()
        call = plainly(torch.compile(model, backend="aot_eager", **options), name)
        if already_run:
            call()
        return call

    return arrange


situation("compiled as one graph, and run", costly=True)(compiled(fullgraph=True, already_run=True))


@situation("compiled in place", costly=True)
def compiled_in_place(model: Any, name: str) -> Call:
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    return plainly(model, name)


@situation("blocks compiled, and run", costly=True)
def compiled_blocks(model: Any, name: str) -> Call:
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    call = plainly(model, name)
    call()
    return call


@situation("compiled gradients", costly=True)
def compiled_gradients(model: Any, name: str) -> Call:
    torch.compiler.reset()
    call = training(False)(torch.compile(model, backend="aot_eager"), name)
    return call


for _name, _rows in MASKS.items():

    @situation(f"compiled, {_name}", costly=True)
    def compiled_masks(model: Any, name: str, rows: Any = _rows) -> Call:
        torch.compiler.reset()
        return masks(rows)(torch.compile(model, backend="aot_eager", fullgraph=True), name)


def taking(model: Any, name: str) -> tuple[Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...]]:
    """A model as a function of the tensors in its arguments, and two sets of these."""
    leaves, spec = tree_flatten(MODELS[name].arguments())
    others, _ = tree_flatten(MODELS[name].arguments(seed=2))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def call(*tensors: Tensor) -> Tensor:
        given = [*leaves]
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        return output(model(**tree_unflatten(given, spec)))

    return call, tuple(leaves[i] for i in places), tuple(others[i] for i in places)


def traced(trace: Callable[[Any, tuple[Tensor, ...]], Any]) -> Arrange:
    """The graph is run on other values than those it was traced with."""

    def arrange(model: Any, name: str) -> Call:
        function, first, second = taking(model, name)
        with torch.no_grad():
            graph = trace(function, first)

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [graph(*first), graph(*second)]

        return call

    return arrange


class AsModule(nn.Module):
    def __init__(self, model: Any, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


@situation("torch.jit.trace", orders=("after",), out=False, costly=True)
def jit_traced(model: Any, name: str) -> Call:
    model.requires_grad_(False)
    # Sizes are constants of such a trace, which it warns of wherever host or swap compare them.
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    return traced(lambda function, given: torch.jit.trace(AsModule(model, function), given, check_trace=False))(
        model, name
    )


situation("make_fx", orders=("after",), out=False, costly=True)(
    traced(lambda function, given: make_fx(function)(*given))
)
situation("make_fx over fake tensors", orders=("after",), out=False, costly=True)(
    traced(lambda function, given: make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*given))
)


@situation("torch.export", orders=("after",), out=False, costly=True)
def exported(model: Any, name: str) -> Call:
    with torch.no_grad():
        program = torch.export.export(model, (), MODELS[name].arguments(), strict=False)
    return plainly(program.module(), name)


@situation("torch.export, strict", orders=("after",), out=False, costly=True)
def exported_strictly(model: Any, name: str) -> Call:
    with torch.no_grad():
        program = torch.export.export(model, (), MODELS[name].arguments(), strict=True)
    return plainly(program.module(), name)
