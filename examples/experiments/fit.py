"""The training loop of the experiments' small nets, and a model that needs no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vdcore.models import VDiT, VDiTConfig

Loss = Callable[[int, torch.Generator], Tensor]  # of a step, on a batch drawn from the generator


def fit(net: nn.Module, loss_of: Loss, ticks: Iterable[int], *, steps: int, lr: float, seed: int = 0) -> list[float]:
    """AdamW on clipped gradients; the rate rises over 30 steps and falls over the last quarter. Returns the losses.

    Args:
        ticks: the step numbers, 0 to ``steps - 1``.
        seed: of the generator: the same one draws the same batches.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 30, 4 - 4 * n / steps, 1))
    losses = []
    for step in ticks:
        loss = loss_of(step, random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def random_model(config: VDiTConfig) -> VDiT:
    """Random weights in every layer, those included that begin at 0, such as the gates of AdaLN-Zero."""
    torch.manual_seed(0)
    model = VDiT(config).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape))
    return model
