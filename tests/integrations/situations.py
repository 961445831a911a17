"""What people do with a model of diffusers besides calling it: a table for the test that swaps it in as well.

A situation changes a model, and says how it is called then: ``arrange(model, name)`` returns the call, whose tensors
are compared with the host's in the same situation.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import hooks as host_hooks
from diffusers.hooks import layer_skip, smoothed_energy_guidance_utils
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from diffusers.training_utils import EMAModel
from host_runs import MODELS, output
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

Call = Callable[[], list[Tensor]]
Arrange = Callable[[Any, str], Call]


@dataclass(frozen=True)
class Situation:
    """
    Args:
        arrange: as the module's docstring says.
        needs: packages, besides diffusers.
        out: the host's bits come back when the model is swapped out again.
        orders: when the situation comes: after the swap, or before.
        costly: it takes seconds: one family of every mechanism is enough.
    """

    arrange: Arrange
    needs: tuple[str, ...] = ()
    out: bool = True
    orders: tuple[str, ...] = ("after", "before")
    costly: bool = False


SITUATIONS: dict[str, Situation] = {}


def situation(name: str, *needs: str, **options: Any) -> Callable[[Arrange], Arrange]:
    def enter(arrange: Arrange) -> Arrange:
        SITUATIONS[name] = Situation(arrange, needs, **options)
        return arrange

    return enter


# ---- How a model is called ----


def plainly(model: Any, name: str, **others: Any) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [output(model(**MODELS[name].arguments(), **others))]

    return call


def in_steps(model: Any, name: str, count: int = 4) -> Call:
    """As a sampler does, with a video that changes a little from step to step."""

    def call() -> list[Tensor]:
        registry = getattr(model, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks()
        given, found = MODELS[name].arguments(), []
        key = "sample" if "sample" in given else "hidden_states"
        for step in range(count):
            context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
            with torch.no_grad(), context:
                found.append(output(model(**{**given, key: given[key] * (1 - 0.05 * step)})))
        return found

    return call


def blocks_of(model: Any) -> str:
    """The path of a list of blocks that has spatial attention."""
    if hasattr(model, "mid_block"):
        found = (n for n, m in model.named_modules() if n.endswith("transformer_blocks") and "motion" not in n)
        return next(found)
    return "auto"


# ---- Step caches ----


def cached(make: Callable[[], Any]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        model.enable_cache(make())
        return in_steps(model, name)

    return arrange


def at() -> int:
    return 500


CACHES: dict[str, Callable[[], Any]] = {
    "first block cache": lambda: host_hooks.FirstBlockCacheConfig(threshold=0.5),
    "MagCache": lambda: host_hooks.MagCacheConfig(
        mag_ratios=[1.0, 0.99, 0.98, 0.97], num_inference_steps=4, threshold=0.5, retention_ratio=0.25
    ),
    "TaylorSeer": lambda: host_hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
    ),
    "pyramid attention broadcast": lambda: host_hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        current_timestep_callback=at,
    ),
    "FasterCache": lambda: host_hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=at,
    ),
    "FasterCache, distilled guidance": lambda: host_hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=at,
        is_guidance_distilled=True,
    ),
}
for _name, _make in CACHES.items():
    situation(_name)(cached(_make))


@situation("a cache, taken off")
def cache_off(model: Any, name: str) -> Call:
    cached(CACHES["pyramid attention broadcast"])(model, name)()
    model.disable_cache()
    return plainly(model, name)


# ---- Guidance ----


def skipping(**options: Any) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        config = host_hooks.LayerSkipConfig(indices=[0], fqn=blocks_of(model), **options)
        host_hooks.apply_layer_skip(model, config)
        return plainly(model, name)

    return arrange


situation("a block skipped")(skipping())
situation("attention skipped")(skipping(skip_ff=False))
situation("feed-forward skipped")(skipping(skip_attention=False))
situation("attention scores skipped")(skipping(skip_attention=False, skip_ff=False, skip_attention_scores=True))


@situation("guidance by skipped scores")
def perturbed(model: Any, name: str) -> Call:
    """As the guiders do: hooks go in for one of two calls, and out again."""
    call = plainly(model, name)

    def both() -> list[Tensor]:
        before = call()
        config = host_hooks.LayerSkipConfig(
            indices=[0], fqn=blocks_of(model), skip_attention=False, skip_ff=False, skip_attention_scores=True
        )
        layer_skip._apply_layer_skip_hook(model, config, name="perturbed")
        try:
            between = call()
        finally:
            registry = host_hooks.HookRegistry.check_if_exists_or_initialize(model)
            registry.remove_hook("perturbed", recurse=True)
        return [*before, *between, *call()]

    return both


@situation("smoothed energy guidance")
def smoothed(model: Any, name: str) -> Call:
    config = smoothed_energy_guidance_utils.SmoothedEnergyGuidanceConfig(indices=[0], fqn=blocks_of(model))
    smoothed_energy_guidance_utils._apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0)
    return plainly(model, name)


@situation("perturbed attention of a U-Net")
def pag_processor(model: Any, name: str) -> Call:
    """What the pipelines of perturbed attention guidance set."""
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.processor = PAGIdentitySelfAttnProcessor2_0()
    return plainly(model, name)


# ---- Adapters and what U-Nets have besides ----


@situation("default processors")
def default_processors(model: Any, name: str) -> Call:
    model.set_default_attn_processor()
    return plainly(model, name)


def load_ip_adapter(unet: Any) -> None:
    torch.manual_seed(5)
    names = [n for n in unet.attn_processors if not n.endswith("attn1.processor") and "motion_modules" not in n]
    layers = {
        f"{2 * i + 1}.{part}.weight": torch.randn(unet.get_submodule(n.removesuffix(".processor")).inner_dim, 16)
        for i, n in enumerate(names)
        for part in ("to_k_ip", "to_v_ip")
    }
    image = {
        "proj.weight": torch.randn(64, 8),
        "proj.bias": torch.zeros(64),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    unet._load_ip_adapter_weights([{"ip_adapter": layers, "image_proj": image}], low_cpu_mem_usage=False)


@situation("an IP-Adapter")
def ip_adapter(model: Any, name: str) -> Call:
    load_ip_adapter(model)
    return plainly(model, name, added_cond_kwargs={"image_embeds": [torch.ones(2, 1, 8)]})


@situation("an IP-Adapter, unloaded")
def ip_adapter_unloaded(model: Any, name: str) -> Call:
    """As pipelines do: the processors of the default class, made from those that are there."""
    load_ip_adapter(model)
    from diffusers.models import attention_processor

    adapters = (
        attention_processor.IPAdapterAttnProcessor,
        attention_processor.IPAdapterAttnProcessor2_0,
    )
    model.encoder_hid_proj = None
    model.config.encoder_hid_dim_type = None
    default = attention_processor.AttnProcessor2_0
    processors = {n: default() if isinstance(p, adapters) else p.__class__() for n, p in model.attn_processors.items()}
    model.set_attn_processor(processors)
    return plainly(model, name)


class FreeNoise(AnimateDiffFreeNoiseMixin):
    """As much of a pipeline as the mixin touches."""

    device, dtype = torch.device("cpu"), torch.float32
    _free_noise_context_length, _free_noise_context_stride, _free_noise_weighting_scheme = 2, 1, "pyramid"

    def __init__(self, unet: Any) -> None:
        self.blocks = [b for b in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if hasattr(b, "motion_modules")]

    def enable(self) -> None:
        for block in self.blocks:
            self._enable_free_noise_in_block(block)

    def disable(self) -> None:
        for block in self.blocks:
            self._disable_free_noise_in_block(block)


@situation("FreeNoise")
def free_noise(model: Any, name: str) -> Call:
    FreeNoise(model).enable()
    return plainly(model, name)


@situation("FreeNoise, disabled")
def free_noise_off(model: Any, name: str) -> Call:
    noise = FreeNoise(model)
    noise.enable()
    plainly(model, name)()
    noise.disable()
    return plainly(model, name)


@situation("FreeU")
def free_u(model: Any, name: str) -> Call:
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    return plainly(model, name)


@situation("fused projections")
def fused_projections(model: Any, name: str) -> Call:
    model.fuse_qkv_projections()
    return plainly(model, name)


@situation("fused projections, taken apart", out=False)  # the host keeps the processors that it replaced
def unfused_projections(model: Any, name: str) -> Call:
    model.fuse_qkv_projections()
    plainly(model, name)()
    model.unfuse_qkv_projections()
    return plainly(model, name)


@situation("chunked feed-forward")
def chunked(model: Any, name: str) -> Call:
    model.enable_forward_chunking(1, 1)
    return plainly(model, name)


# ---- LoRA ----


def _add_lora(model: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    known = re.compile(r"attn|attention|\.ff|patch")
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    layers = (n for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1)
    targets = [layer for layer in layers if known.search(layer)]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    model.eval()


def lora(act: Callable[[Any], Any]) -> Arrange:
    def arrange(model: Any, name: str) -> Call:
        _add_lora(model)
        act(model)
        return plainly(model, name)

    return arrange


situation("LoRA", "peft")(lora(lambda model: None))
situation("LoRA, fused", "peft")(lora(lambda model: model.fuse_lora()))
situation("LoRA, fused and unfused", "peft")(lora(lambda model: (model.fuse_lora(), model.unfuse_lora())))
situation("LoRA, disabled", "peft")(lora(lambda model: model.disable_adapters()))
situation("LoRA, fused and unloaded", "peft")(lora(lambda model: (model.fuse_lora(), model.unload_lora())))
situation("LoRA, unloaded", "peft")(lora(lambda model: model.unload_lora()))


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


# ---- Gradients ----


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


# ---- Compilers ----


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


# ---- Processes ----


@situation("DistributedDataParallel", costly=True)
def data_parallel(model: Any, name: str) -> Call:
    from torch.nn.parallel import DistributedDataParallel

    return training(False)(DistributedDataParallel(model, find_unused_parameters=True), name)


def sharded_parts(model: Any) -> list[Any]:
    """Blocks of transformers, outermost ones, and the model."""
    lists = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("blocks")]
    blocks = [
        m
        for m in itertools.chain.from_iterable(lists)
        if "Down" not in type(m).__name__ and "Up" not in type(m).__name__
    ]
    return [*blocks, model]


@situation("FSDP2", costly=True)
def fully_sharded(model: Any, name: str) -> Call:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    parts = sharded_parts(model)
    for module in parts:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    call = training(False)(model, name)

    def sharded() -> list[Tensor]:
        assert all(isinstance(module, FSDPModule) for module in parts)
        return call()

    return sharded
