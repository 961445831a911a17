"""Hooks of modules, of all modules and of weights, and classes that others derive."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from diffusers import hooks as host_hooks
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from situations.entry import Arrange, Call, plainly, situation
from situations.gradients import training

# ---- Hooks ----


def hooked(*steps: str) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        parts = [m for m in model.modules() if "Block" in type(m).__name__ or hasattr(m, "processor")]
        for step, key in (step.split() for step in steps):
            for module in parts:
                registry = host_hooks.HookRegistry.check_if_exists_or_initialize(module)
                if step == "add":
                    registry.register_hook(host_hooks.ModelHook(), key)
                else:
                    registry.remove_hook(key, recurse=False)
        return plainly(model, name)

    return arrange


situation("a hook")(hooked("add a"))
situation("a hook, removed")(hooked("add a", "remove a"))
situation("two hooks, the first removed")(hooked("add a", "add b", "remove a"))
situation("two hooks, removed")(hooked("add a", "add b", "remove a", "remove b"))


# ---- Classes that others derive ----


def scaled(out: Any) -> Any:
    return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out


def derived(module: nn.Module) -> type:
    """A class with a forward of its own, as patches of others make it."""
    cls: Any = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(cls.forward(self, *args, **kwargs))

    return type(f"Derived{cls.__name__}", (cls,), {"forward": forward})


def blocks_with_attention(model: Any) -> list[Any]:
    return [m for m in model.modules() if any(hasattr(child, "processor") for child in m.children())]


@situation("derived blocks")
def derived_blocks(model: Any, name: str) -> Call:
    for block in blocks_with_attention(model):
        block.__class__ = derived(block)
    return plainly(model, name)


@situation("derived layers", costly=True)
def derived_layers(model: Any, name: str) -> Call:
    """All that blocks are made of: norms, products, attention, convolutions."""
    kinds = (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Conv2d, nn.Conv3d, nn.Dropout)
    for module in list(model.modules()):
        if isinstance(module, kinds) or hasattr(module, "processor"):
            module.__class__ = derived(module)
    return plainly(model, name)


def host_class(x: Any, mark: str) -> Any:
    return getattr(type(x), mark, type(x))


@situation("classes of blocks changed", costly=True)
def changed_blocks(model: Any, name: str) -> Call:
    """By their names in the host, and as the classes of the model's blocks."""
    blocks = blocks_with_attention(model)
    named = [(host_class(block, "host"), "forward") for block in blocks]
    of_blocks = [(type(block), "forward") for block in blocks]
    return lambda: [*changed(named, model, name), *changed(of_blocks, model, name)]


@situation("classes of processors changed", costly=True)
def changed_processors(model: Any, name: str) -> Call:
    processors = [m.processor for m in model.modules() if getattr(m, "processor", None) is not None]
    return lambda: changed([(host_class(x, "HOST"), "__call__") for x in processors], model, name)


def changed(of: list[tuple[Any, str]], model: Any, name: str) -> list[Tensor]:
    """A call while functions of classes are others."""
    before = {(cls, key): cls.__dict__[key] for cls, key in of if key in cls.__dict__}

    def around(function: Any) -> Any:
        @wraps(function)  # hosts pass what the signature names, and drop the rest
        def other(*args: Any, **kwargs: Any) -> Any:
            return scaled(function(*args, **kwargs))

        return other

    try:
        for (cls, key), function in before.items():
            setattr(cls, key, around(function))
        return plainly(model, name)()
    finally:
        for (cls, key), function in before.items():
            setattr(cls, key, function)


@situation("a hook on every module")
def scaling_hooks(model: Any, name: str) -> Call:
    """It adds what depends on the place in the host's layout."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or out.ndim < 2:
            return None
        return out + 0.01 * torch.arange(out.shape[1]).view(-1, *[1] * (out.ndim - 2))

    for module in model.modules():
        if module is not model and not isinstance(module, nn.Dropout | nn.Identity):
            module.register_forward_hook(hook)
    return plainly(model, name)


@situation("a hook that does nothing")
def idle_hooks(model: Any, name: str) -> Call:
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda module, args, out: None)
    return plainly(model, name)


# ---- Hooks with keywords, backward ones, and those of every module there is ----


def attention_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "processor")]


def larger(x: Any) -> Any:
    return 1.1 * x if isinstance(x, Tensor) and x.is_floating_point() else x


@situation("hooks with keywords", costly=True)
def hooks_with_keywords(model: Any, name: str) -> Call:
    def before(module: Any, args: Any, kwargs: Any) -> Any:
        named = {key: larger(x) if key == "hidden_states" else x for key, x in kwargs.items()}
        return tuple(larger(x) for x in args), named

    for attn in attention_of(model):
        attn.register_forward_pre_hook(before, with_kwargs=True)
    return plainly(model, name)


@situation("backward hooks", costly=True)
def backward_hooks(model: Any, name: str) -> Call:
    for module in (m for m in model.modules() if hasattr(m, "processor") or type(m) is nn.Linear):
        module.register_full_backward_hook(lambda module, given, out: tuple(larger(x) for x in given))
    return training(False)(model, name)


def all_modules(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        def call() -> list[Tensor]:
            handle = register(hook)
            try:
                return plainly(model, name)()
            finally:
                handle.remove()

        return call

    return arrange


def add_places(module: Any, args: Any, out: Any) -> Any:
    """What depends on the place in the host's layout."""
    if type(module) not in (nn.Linear, nn.LayerNorm) or out.ndim < 3:
        return None
    return out + 0.01 * torch.arange(out.shape[1]).view(-1, *[1] * (out.ndim - 2))


def scale_places(module: Any, args: Any) -> Any:
    if type(module) not in (nn.Linear, nn.LayerNorm) or not args or args[0].ndim < 3:
        return None
    x = args[0]
    return (x * (1 + 0.01 * torch.arange(x.shape[1]).view(-1, *[1] * (x.ndim - 2))), *args[1:])


situation("a hook of all modules", costly=True)(all_modules(register_module_forward_hook, add_places))
situation("a hook before all modules", costly=True)(all_modules(register_module_forward_pre_hook, scale_places))
