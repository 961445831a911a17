"""Hooks of others inside of what is served: what they are called with is what the host would call them with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vdcore.integrations.swap import OUR_HOOKS, changed_forward, has_global_hooks, is_from

OBSERVED = "a hook of others inside, which gets what the host would give it"

# Hooks that move, gather or cast weights, by the modules of their classes; they look at no tokens.
_OF_WEIGHTS = (
    "torch.",
    "accelerate.",
    "diffusers.hooks.group_offloading",
    "diffusers.hooks.hooks",
    "diffusers.hooks.layerwise_casting",
)


def is_observed(modules: Iterable[nn.Module | None]) -> bool:
    """A hook on one of these modules, or on one inside of them, sees its tokens."""
    left = [module for module in modules if module is not None]
    if not left:
        return False
    if has_global_hooks():
        return True
    if torch.compiler.is_compiling():  # which knows no other walk
        return any(_sees_tokens(inside) for module in left for inside in module.modules())
    # Every call asks: a walk without names and a memo takes a sixth of the time of modules().
    while left:
        module = left.pop()
        if module is None:  # a child that is not there
            continue
        state = module.__dict__
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or "forward" in state
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ) and _sees_tokens(module):
            return True
        if inside := state["_modules"]:
            left += inside.values()
    return False


def _sees_tokens(module: nn.Module) -> bool:
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    if any(hooks) and not all(_is_of_weights(hook) for by_key in hooks for hook in by_key.values()):
        return True
    if "forward" not in module.__dict__ or changed_forward(module) is None:
        return False
    # diffusers and accelerate replace the forward, and say by what.
    registry, aligning = module.__dict__.get("_diffusers_hook"), module.__dict__.get("_hf_hook")
    known = [*([] if registry is None else registry.hooks.values()), *([] if aligning is None else [aligning])]
    return not known or not all(_is_of_weights(hook) for hook in known)


def _is_of_weights(hook: Any) -> bool:
    return isinstance(hook, OUR_HOOKS) or is_from(hook, *_OF_WEIGHTS)
