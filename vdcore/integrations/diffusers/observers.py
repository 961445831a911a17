"""Hooks of others inside of what is served: what they are called with is what the host would call them with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vdcore.integrations.swap import OUR_HOOKS, changed_forward

OBSERVED = "a hook of others inside, which gets what the host would give it"

# Hooks that move, gather or cast weights, by the modules of their classes; they look at no tokens.
_OF_WEIGHTS = (
    "torch.",
    "accelerate.",
    "diffusers.hooks.group_offloading",
    "diffusers.hooks.hooks",
    "diffusers.hooks.layerwise_casting",
)


def is_observed(modules: Iterable[nn.Module]) -> bool:
    """A hook on one of these modules sees its tokens."""
    return any(_sees_tokens(module) for module in modules)


def _sees_tokens(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks, module._forward_hooks
    if any(hooks) and not all(_is_of_weights(hook) for by_key in hooks for hook in by_key.values()):
        return True
    if "forward" not in module.__dict__ or changed_forward(module) is None:
        return False
    # diffusers and accelerate replace the forward, and say by what.
    registry, aligning = module.__dict__.get("_diffusers_hook"), module.__dict__.get("_hf_hook")
    known = [*([] if registry is None else registry.hooks.values()), *([] if aligning is None else [aligning])]
    return not known or not all(_is_of_weights(hook) for hook in known)


def _is_of_weights(hook: Any) -> bool:
    if isinstance(hook, OUR_HOOKS):
        return True
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return str(named.__module__).startswith(_OF_WEIGHTS)
