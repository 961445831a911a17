"""Latte's published weights in a VDiT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from vdcore.models.config import VDiTConfig
from vdcore.models.vdit import VDiT

# What a LatteTransformer3DModel may not be configured to.
REQUIRED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
OUTER = {
    "pos_embed.proj": "patch",
    "adaln_single.emb.timestep_embedder.linear_1": "time.up",
    "adaln_single.emb.timestep_embedder.linear_2": "time.proj",
    "adaln_single.linear": "modulation",
    "caption_projection.linear_1": "text.up",
    "caption_projection.linear_2": "text.proj",
    "proj_out": "final",
}


def from_latte(latte: Any) -> VDiT:
    """The same model as diffusers' ``LatteTransformer3DModel``, with a copy of its weights.

    Called with the same video, timestep and text it gives the same video. ``text_lengths`` takes the place of the text
    mask. One frame alone is frame 0 of a video here, which the host treats as a still image.

    Args:
        latte: a ``LatteTransformer3DModel`` in the configuration of Latte-1.

    Raises:
        ValueError: if its configuration is another, with the field and its value.
    """
    config, source = latte.config, dict(latte.state_dict())
    for name, value in REQUIRED.items():
        if config[name] != value:
            _wrong(name, repr(value), repr(config[name]))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["cross_attention_dim"] != width:
        _wrong("cross_attention_dim", f"the width {width}", config["cross_attention_dim"])
    scale = max(config["sample_size"] // 64, 1)
    patch = config["patch_size"]
    given = VDiTConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        patch=(1, patch, patch),
        width=width,
        depth=2 * config["num_layers"],
        heads=config["num_attention_heads"],
        attention="alternating",
        modulation="single",
        base_size=config["sample_size"] // patch / scale,
        text_width=config["caption_channels"],
    )
    weight = source["pos_embed.proj.weight"]
    with torch.device(weight.device):
        model = VDiT(given).to(weight.dtype)
    weights = dict(_renamed(source, config["num_layers"]))
    weights["patch.weight"] = weights["patch.weight"][:, :, None]  # (C, in, p, p) to (C, in, 1, p, p)
    model.load_state_dict(weights)
    return model.train(latte.training)


def _renamed(source: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    yield "final.table", source["scale_shift_table"]
    for theirs, ours in OUTER.items():
        yield from _linear(source, (theirs,), ours)
    for i in range(layers):
        for j, (kind, attention) in enumerate(
            (("transformer_blocks", "spatial"), ("temporal_transformer_blocks", "temporal"))
        ):
            theirs, ours = f"{kind}.{i}", f"blocks.{2 * i + j}"
            yield f"{ours}.modulation.table", source[f"{theirs}.scale_shift_table"]
            packed = tuple(f"{theirs}.attn1.to_{x}" for x in "qkv")
            yield from _linear(source, packed, f"{ours}.layers.{attention}.qkv")
            yield from _linear(source, (f"{theirs}.attn1.to_out.0",), f"{ours}.layers.{attention}.proj")
            yield from _linear(source, (f"{theirs}.ff.net.0.proj",), f"{ours}.layers.mlp.up")
            yield from _linear(source, (f"{theirs}.ff.net.2",), f"{ours}.layers.mlp.proj")
            if attention == "spatial":
                yield from _linear(source, (f"{theirs}.attn2.to_q",), f"{ours}.layers.cross.q")
                both = f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"
                yield from _linear(source, both, f"{ours}.layers.cross.kv")
                yield from _linear(source, (f"{theirs}.attn2.to_out.0",), f"{ours}.layers.cross.proj")


def _linear(source: dict[str, Tensor], theirs: tuple[str, ...], ours: str) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of one projection, or of several packed into one; a bias that the host has not is 0."""
    weights = [source[f"{name}.weight"] for name in theirs]
    biases = [source.get(f"{name}.bias", w.new_zeros(len(w))) for name, w in zip(theirs, weights)]
    yield f"{ours}.weight", torch.cat(weights)
    yield f"{ours}.bias", torch.cat(biases)


def _wrong(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"from_latte: {name} must be {expected}, got {got}")
