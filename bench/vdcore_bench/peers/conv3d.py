"""Patches as a convolution whose stride is its kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Function, Makers
from vdcore_bench.peers.registry import peer


def _conv3d(memory_format: torch.memory_format) -> Function:
    def patchify(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        video, weight = (x.contiguous(memory_format=memory_format) for x in (video, weight))
        y = F.conv3d(video, weight, bias, stride=weight.shape[2:])
        return y.flatten(3).permute(0, 2, 3, 1).contiguous()

    return patchify


@peer("conv3d", ("patchify",))
def conv3d(job: Job) -> Makers:
    return {
        "channels first": lambda: _conv3d(torch.contiguous_format),
        "channels last": lambda: _conv3d(torch.channels_last_3d),
    }
