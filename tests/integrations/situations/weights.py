"""Weights of other kinds and on other devices; other models from a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from host_runs import MODELS, output
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from situations.entry import Arrange, Call, plainly, situation

# ---- Weights of other kinds, on other devices ----


@situation("int8 weights", "torchao")
def int8_weights(model: Any, name: str) -> Call:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return plainly(model, name)


class OnlyLinear(Tensor):
    """A weight that nothing but a linear layer takes."""

    w: Tensor

    @staticmethod
    def __new__(cls, w: Tensor) -> Any:
        out = Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)
        out.w = w
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].w, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].w)
        raise NotImplementedError(f"weight used by {func}")


@situation("weights of another class")
def other_weights(model: Any, name: str) -> Call:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(OnlyLinear(module.weight.detach()), requires_grad=False)
    return plainly(model, name)


@situation("layerwise float8")
def layerwise_float8(model: Any, name: str) -> Call:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return plainly(model, name)


@situation("accelerate's offloading", "accelerate")
def cpu_offload(model: Any, name: str) -> Call:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))
    return plainly(model, name)


@situation("accelerate's offloading, removed", "accelerate")
def cpu_offload_removed(model: Any, name: str) -> Call:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(model, torch.device("cpu"))
    plainly(model, name)()
    remove_hook_from_module(model, recurse=True)
    return plainly(model, name)


@situation("group offloading of leaves", "accelerate")
def group_offload_leaves(model: Any, name: str) -> Call:
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return plainly(model, name)


@situation("group offloading of blocks", "accelerate")
def group_offload_blocks(model: Any, name: str) -> Call:
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    return plainly(model, name)


@situation("half precision and back", out=False)
def cast(model: Any, name: str) -> Call:
    model.to(torch.bfloat16).to(torch.float32)
    return plainly(model, name)


# ---- Other models from it ----


@situation("an average of weights")
def ema(model: Any, name: str) -> Call:
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    average.step(model.parameters())
    average.copy_to(model.parameters())
    return plainly(model, name)


@situation("an average, saved and loaded", "accelerate")
def ema_saved(model: Any, name: str) -> Call:
    import tempfile

    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    with tempfile.TemporaryDirectory() as path:
        average.save_pretrained(path)
        again = EMAModel.from_pretrained(path, type(model))
    again.copy_to(model.parameters())
    return plainly(model, name)


@situation("saved and loaded", "accelerate")
def saved(model: Any, name: str) -> Call:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        again = type(model).from_pretrained(path).eval()
    return plainly(again, name)


@situation("made from its configuration")
def from_config(model: Any, name: str) -> Call:
    again = type(model).from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    return plainly(again, name)


# ---- Other dtypes, layouts and forms of weights ----


def in_dtype(dtype: torch.dtype) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        model.to(dtype)

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [output(model(**MODELS[name].arguments(dtype))).float()]

        return call

    return arrange


situation("in float64", out=False, costly=True)(in_dtype(torch.float64))
situation("in bfloat16", out=False, costly=True)(in_dtype(torch.bfloat16))
situation("in float16", out=False, costly=True)(in_dtype(torch.float16))


@situation("channels last", costly=True)
def channels_last(model: Any, name: str) -> Call:
    three = any(isinstance(module, nn.Conv3d) for module in model.modules())
    model.to(memory_format=torch.channels_last_3d if three else torch.channels_last)
    return plainly(model, name)


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.2 * weight


@situation("parametrized weights", out=False, costly=True)
def parametrized(model: Any, name: str) -> Call:
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(module, nn.GroupNorm):
            parametrize.register_parametrization(module, "weight", Larger())
    return plainly(model, name)


@situation("pruned, and changed since", costly=True)
def pruned(model: Any, name: str) -> Call:
    for module in [m for m in model.modules() if type(m) is nn.Linear]:
        prune.l1_unstructured(module, "weight", 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return plainly(model, name)


def loaded(**options: Any) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        state = {key: 1.1 * x for key, x in MODELS[name].model().state_dict().items()}
        model.load_state_dict(state, strict=True, **options)
        return plainly(model, name)

    return arrange


situation("weights loaded", costly=True)(loaded())
situation("weights put in place", costly=True)(loaded(assign=True))


@situation("on the meta device, then loaded", out=False, costly=True)
def from_meta(model: Any, name: str) -> Call:
    state = {key: x.clone() for key, x in model.state_dict().items()}
    buffers = {key: x.clone() for key, x in model.named_buffers()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    for key, x in buffers.items():
        model.get_buffer(key).copy_(x)
    return plainly(model, name)


# ---- Copies ----


def copied(how: Callable[[Any], Any]) -> Arrange:
    return lambda model, name: plainly(how(model), name)


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


situation("a copy", orders=("after",), out=False, costly=True)(copied(copy.deepcopy))
situation("a shallow copy", out=False, costly=True)(copied(copy.copy))
situation("a pickle", orders=("after",), out=False, costly=True)(
    copied(lambda model: pickle.loads(pickle.dumps(model)))
)
situation("torch.save", orders=("after",), out=False, costly=True)(copied(through_a_file))
