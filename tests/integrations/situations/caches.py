"""Step caches, and guidance that skips blocks, attention or its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import hooks as host_hooks
from diffusers.hooks import layer_skip, smoothed_energy_guidance_utils
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from torch import Tensor

from situations.entry import Arrange, Call, blocks_of, in_steps, plainly, situation

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
