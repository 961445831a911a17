"""What tiny models share: sizes, random weights, inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

T = int(os.environ.get("ZOO_FRAMES", "3"))
H, W, L, TEXT = 4, 6, 5, 16  # latent rows and columns, text tokens and channels
B = 2


@dataclass(frozen=True)
class Tiny:
    """One model of diffusers in small.

    Args:
        build: makes the model, its weights as the host draws them.
        inputs: the arguments of its forward, floating ones in float32.
        factorized: attention is spatial and temporal by turns; else over all frames at once.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    factorized: bool = False

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model in evaluation mode; weights that the host starts at one number are drawn as well.

        In half precision the host keeps some modules in float32.
        """
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and parameter.min() == parameter.max():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype in (torch.float16, torch.bfloat16):
            wide = getattr(model, "_keep_in_fp32_modules", None) or []
            for module_name, module in model.named_modules():
                if not any(part in module_name.split(".") for part in wide):
                    _cast_own(module, dtype, wide)
        elif dtype != torch.float32:
            model = nn.Module.to(model, dtype)
        return model

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Any]:
        """The inputs, the same numbers in any dtype."""
        torch.manual_seed(seed)

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cast(y) for y in x)
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return {name: cast(x) for name, x in self.inputs().items()}


def _cast_own(module: nn.Module, dtype: torch.dtype, wide: list[str]) -> None:
    """Casts what the module itself holds, without the names that stay in float32."""
    for held in (module._parameters, module._buffers):
        for name, x in held.items():
            if x is not None and x.is_floating_point() and name not in wide:
                x.data = x.data.to(dtype)


def output(result: Any) -> Tensor:
    """The video in what a model returns."""
    return result[0] if isinstance(result, tuple) else result.sample


def text(channels: int = TEXT, tokens: int = L, batch: int = B) -> Tensor:
    return torch.randn(batch, tokens, channels)


def video(channels: int = 4, frames: int = T) -> Tensor:
    return torch.randn(B, channels, frames, H, W)


def timestep() -> Tensor:
    return torch.tensor([7, 301])


def text_mask() -> Tensor:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, L - 2 :] = 0
    return mask


def plain_inputs() -> dict[str, Any]:
    return {"hidden_states": video(), "encoder_hidden_states": text(), "timestep": timestep()}


def masked_inputs() -> dict[str, Any]:
    """As :func:`plain_inputs`, with a text of which one sample is padded."""
    return {**plain_inputs(), "encoder_attention_mask": text_mask()}
