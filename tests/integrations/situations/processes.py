"""Several processes."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from situations.entry import Call, situation
from situations.gradients import training


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
