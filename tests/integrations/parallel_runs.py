"""A model on two processes, by diffusers' own context parallelism, for the tests."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from zoo import MODELS

from vdcore.integrations.diffusers import swap_in

PROCESSES = 2


def context_parallel(model):
    """The host's enable_parallelism; its way to a device of the accelerator is stepped over, as there is none."""
    from diffusers.models import _modeling_parallel as parallel
    from torch.distributed.device_mesh import init_device_mesh

    config = parallel.ContextParallelConfig(ulysses_degree=PROCESSES)
    whole = parallel.ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole.setup(dist.get_rank(), PROCESSES, torch.device("cpu"), mesh=mesh)
    model._resolve_parallel_config = lambda config: whole
    try:
        model.enable_parallelism(config=config)
    finally:
        del model._resolve_parallel_config


def _run(rank, folder, name, order):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model = MODELS[name].model()
    if order == "after":
        swap_in(model)
    context_parallel(model)
    if order == "before":
        swap_in(model)
    with torch.no_grad():
        out = model(**MODELS[name].arguments(), return_dict=False)[0]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@cache
def on_two_processes(name, order=None):
    """The results of both processes.

    Args:
        order: whether context parallelism comes after the swap or before it; None: nothing is swapped.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (folder, name, order), nprocs=PROCESSES)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]
