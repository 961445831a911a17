"""IP-adapters, FreeNoise, FreeU and what else U-Nets have; LoRA."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from torch import nn

from situations.entry import Arrange, Call, plainly, situation

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


def _add_lora(model: Any, *names: str, **options: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    known = re.compile(r"attn|attention|\.ff|patch")
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    layers = (n for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1)
    targets = [layer for layer in layers if known.search(layer)]
    for name in names or ("default",):
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets, **options)
        model.add_adapter(config, name)
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


def around(kind: str, then: Callable[[Any], Any]) -> Arrange:
    """PEFT's own model around a model."""

    def arrange(model: Any, name: str) -> Call:
        import peft

        torch.manual_seed(5)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        config = {
            "LoRA": lambda: peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False),
            "DoRA": lambda: peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False, use_dora=True),
            "IA3": lambda: peft.IA3Config(target_modules=layers, feedforward_modules=[], init_ia3_weights=False),
            "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=layers, init_weights=False),
        }[kind]()
        return plainly(then(peft.get_peft_model(model, config)), name)

    return arrange


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


for _kind in ("LoRA", "DoRA", "IA3", "LoKr"):
    situation(f"PEFT's {_kind} around", "peft", out=False, costly=True)(around(_kind, lambda model: model))
situation("PEFT's LoRA around, merged", "peft", out=False, costly=True)(around("LoRA", merged))
situation("PEFT's LoRA around, merged and unloaded", "peft", out=False, costly=True)(
    around("LoRA", lambda model: model.merge_and_unload())
)


@situation("two LoRAs", "peft", costly=True)
def two_loras(model: Any, name: str) -> Call:
    _add_lora(model, "one", "other")
    model.set_adapters(["one", "other"], [0.5, 2.0])
    return plainly(model, name)


@situation("two LoRAs, one deleted", "peft", costly=True)
def one_of_two_loras(model: Any, name: str) -> Call:
    two_loras(model, name)()
    model.delete_adapters("one")
    model.set_adapters(["other"], [1.5])
    return plainly(model, name)


@situation("LoRA with norms of its own", "peft", costly=True)
def dora(model: Any, name: str) -> Call:
    _add_lora(model, use_dora=True)
    return plainly(model, name)


@situation("LoRA, scaled by the call", "peft", costly=True)
def lora_scaled(model: Any, name: str) -> Call:
    _add_lora(model)
    known = inspect.signature(model.forward).parameters
    key = next(key for key in ("attention_kwargs", "cross_attention_kwargs") if key in known)
    return plainly(model, name, **{key: {"scale": 0.5}})
