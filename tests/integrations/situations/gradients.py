"""Gradients, and functions of torch.func of a model, its inputs or its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from host_runs import MODELS, output
from torch import Tensor, nn
from torch.func import functional_call

from situations.entry import Arrange, Call, plainly, situation


def training(checkpointing: bool) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_gradient_checkpointing()

        def call() -> list[Tensor]:
            given = MODELS[name].arguments()
            key = "sample" if "sample" in given else "hidden_states"
            x = given[key].requires_grad_()
            y = output(model(**given))
            return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), x)]

        return call

    return arrange


situation("gradients")(training(False))
situation("gradient checkpointing")(training(True))


@situation("gradient checkpointing, turned off", costly=True)
def checkpointing_off(model: Any, name: str) -> Call:
    training(True)(model, name)()
    model.disable_gradient_checkpointing()
    return training(False)(model, name)


@situation("saved tensors elsewhere", costly=True)
def saved_elsewhere(model: Any, name: str) -> Call:
    plain = training(False)(model, name)

    def call() -> list[Tensor]:
        with torch.autograd.graph.save_on_cpu():
            return plain()

    return call


@situation("a step of training", costly=True)
def stepped(model: Any, name: str) -> Call:
    start = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def call() -> list[Tensor]:
        model.load_state_dict(start)
        output(model(**MODELS[name].arguments())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return plainly(model, name)()

    return call


# ---- torch.func ----


def of_input(model: Any, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    given = MODELS[name].arguments()
    key = "sample" if "sample" in given else "hidden_states"
    return lambda x: output(model(**{**given, key: x})), given[key]


@situation("torch.func.grad", costly=True)
def func_grad(model: Any, name: str) -> Call:
    function, x = of_input(model, name)
    return lambda: [torch.func.grad(lambda x: function(x).square().sum())(x)]


@situation("several gradients at once", costly=True)
def batched_gradients(model: Any, name: str) -> Call:
    function, x = of_input(model, name)

    def call() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return list(torch.autograd.grad(y, leaf, torch.stack([y.detach(), y.detach() - 1]), is_grads_batched=True))

    return call


@situation("vmap over inputs", costly=True)
def vmapped_inputs(model: Any, name: str) -> Call:
    function, x = of_input(model, name)

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [torch.vmap(function)(torch.stack([x, 2 * x]))]

    return call


@situation("weights of the call", costly=True)
def functional(model: Any, name: str) -> Call:
    weights = {key: 1.05 * x.detach() for key, x in model.named_parameters()}

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [output(functional_call(model, weights, (), MODELS[name].arguments()))]

    return call


@situation("vmap over weights", costly=True)
def vmapped_weights(model: Any, name: str) -> Call:
    weights = {key: torch.stack([x.detach(), 1.05 * x.detach()]) for key, x in model.named_parameters()}
    given = MODELS[name].arguments()

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [torch.vmap(lambda w: output(functional_call(model, w, (), given)))(weights)]

    return call
