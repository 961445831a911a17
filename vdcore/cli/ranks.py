"""Commands on several processes of this machine: torchrun starts them, each with the command's own arguments."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = Annotated[float, typer.Option(min=1, help="Seconds that ranks wait for one another.")]


def relaunch(ranks: int) -> int:
    """Runs this command again on so many processes, under torchrun's agent; its exit status, 130 after an interrupt."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    arguments = ["--standalone", f"--nproc-per-node={ranks}", "-m", "vdcore.cli", *sys.argv[1:]]
    try:
        run.run(run.parse_args(arguments))
    except SignalException:  # which the agent has handed on
        return 130
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def launched() -> bool:
    """This process is one that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(ranks: int, device: str, patience: float) -> DeviceMesh:
    """The mesh of all ranks, of which this process is one; NCCL on GPUs, gloo elsewhere.

    Raises:
        ValueError: if torchrun has started another number.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != ranks:
        raise ValueError(f"--ranks: {ranks}, but torchrun has started {world} processes")
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=patience))
    return init_device_mesh(kind, (ranks,), mesh_dim_names=("context",))
