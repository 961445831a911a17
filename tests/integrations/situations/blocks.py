"""Blocks and attention that others use twice, replace or take out; processors that they set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from situations.entry import Arrange, Call, plainly, situation


def lists_of_blocks(model: Any) -> list[Any]:
    """Lists of transformer blocks, which take one another's place."""
    lists = (m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("blocks"))
    return [m for m in lists if "Down" not in type(m[0]).__name__ and "Up" not in type(m[0]).__name__]


def in_every_list(change: Callable[[Any], Any]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        for blocks in lists_of_blocks(model):
            change(blocks)
        return plainly(model, name)

    return arrange


def copy_over(blocks: Any) -> None:
    blocks[-1] = copy.deepcopy(blocks[0])


def take_out(blocks: Any) -> None:
    if len(blocks) > 1:
        del blocks[-1]


def share_attention(blocks: Any) -> None:
    for name, child in blocks[0].named_children():
        if hasattr(child, "processor"):
            setattr(blocks[-1], name, child)


situation("a block used twice", costly=True)(in_every_list(lambda blocks: blocks.append(blocks[0])))
situation("a block copied over another", costly=True)(in_every_list(copy_over))
situation("a block taken out", costly=True)(in_every_list(take_out))
situation("attention that blocks share", costly=True)(in_every_list(share_attention))


@situation("processors set as they are", costly=True)
def same_processors(model: Any, name: str) -> Call:
    model.set_attn_processor(dict(model.attn_processors))
    return plainly(model, name)


@situation("processors made anew", out=False, costly=True)
def new_processors(model: Any, name: str) -> Call:
    model.set_attn_processor({n: p.__class__() for n, p in model.attn_processors.items()})
    return plainly(model, name)


def one_for_all(which: int) -> Arrange:
    """To the host the processors of a class are all the same."""

    def arrange(model: Any, name: str) -> Call:
        of_class: dict[Any, list[Any]] = {}
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if processor is not None:
                of_class.setdefault(getattr(type(processor), "HOST", type(processor)), []).append(module)
        for modules in of_class.values():
            processor = modules[which].processor
            for module in modules:
                module.processor = processor
        return plainly(model, name)

    return arrange


situation("the first processor for all", costly=True)(one_for_all(0))
situation("the last processor for all", costly=True)(one_for_all(-1))


class Around:
    """A processor that calls another, as a patch of others has it."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.inside(attn, *args, **kwargs)
        return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out


@situation("processors inside of others", costly=True)
def processors_inside(model: Any, name: str) -> Call:
    for module in model.modules():
        if getattr(module, "processor", None) is not None:
            module.processor = Around(module.processor)
    return plainly(model, name)


@situation("norms taken out", costly=True)
def no_norms(model: Any, name: str) -> Call:
    for module in model.modules():
        for key, child in module.named_children():
            if type(child).__name__ in ("LayerNorm", "FP32LayerNorm", "GroupNorm"):
                setattr(module, key, nn.Identity())
    return plainly(model, name)


@situation("processors of another kind", costly=True)
def other_processors(model: Any, name: str) -> Call:
    model.set_attn_processor(AttnProcessor())
    return plainly(model, name)


@situation("another backend of attention, and back", costly=True)
def other_backend(model: Any, name: str) -> Call:
    model.set_attention_backend("_native_math")
    plainly(model, name)()
    model.reset_attention_backend()
    return plainly(model, name)


@situation("a call that failed", costly=True)
def failed(model: Any, name: str) -> Call:
    """It leaves nothing of it behind."""

    def fail(module: Any, args: Any, out: Any) -> None:
        raise KeyError("stop")

    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = layer.register_forward_hook(fail)
    try:
        plainly(model, name)()
    except KeyError:
        pass
    finally:
        handle.remove()
    return plainly(model, name)
