"""A call of a model, as it is measured: its forward, or a training step's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_of(module: nn.Module, run: Callable[[], Any], mode: str) -> Callable[[], Any]:
    """What is timed.

    Args:
        run: calls the module, in whatever way.
        mode: ``"fwd"``: without gradients; with ``"bwd"`` in it: the gradients of all parameters that want one.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return run()

    def backward() -> Any:
        return torch.autograd.grad(first_tensor(run()).float().sum(), parameters, allow_unused=True)

    return backward if "bwd" in mode else forward


def first_tensor(output: Any) -> Tensor:
    """Of what a model returned: a tensor, or the first one of a tuple or of a mapping, which diffusers' outputs are.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    inside = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for x in inside:
        if isinstance(x, Tensor):
            return x
    raise TypeError(f"a model must return a tensor, or a tuple or mapping with one in it, got {type(output).__name__}")
