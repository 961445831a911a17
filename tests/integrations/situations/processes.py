"""Several processes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from situations.entry import Call, plainly, situation
from situations.gradients import training


@situation("DistributedDataParallel", costly=True)
def data_parallel(model: Any, name: str) -> Call:
    from torch.nn.parallel import DistributedDataParallel

    return training(False)(DistributedDataParallel(model, find_unused_parameters=True), name)


@situation("DistributedDataParallel, static graph", costly=True)
def static_data_parallel(model: Any, name: str) -> Call:
    from torch.nn.parallel import DistributedDataParallel

    call = training(False)(DistributedDataParallel(model, static_graph=True), name)
    return lambda: [x for _ in range(2) for x in call()]


@situation("FSDP1", out=False, costly=True)
def fully_sharded_before(model: Any, name: str) -> Call:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return plainly(sharded, name)


@situation("tensor parallelism", costly=True)
def tensor_parallel(model: Any, name: str) -> Call:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if hasattr(module, "processor") and isinstance(getattr(module, "to_q", None), nn.Linear):
            layers = [key for key in ("to_q", "to_k", "to_v") if getattr(module, key, None) is not None]
            plan = {**{key: ColwiseParallel() for key in layers}, "to_out.0": RowwiseParallel()}
            parallelize_module(module, mesh, plan)
    return plainly(model, name)


@situation("torch's checkpoint wrappers", costly=True)
def checkpoint_wrappers(model: Any, name: str) -> Call:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    parts = set(sharded_parts(model)) - {model}
    wrappers.apply_activation_checkpointing(model, check_fn=lambda module: module in parts)
    return training(False)(model, name)


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
