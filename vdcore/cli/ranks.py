"""Commands on several processes of this machine: torchrun starts them, each with the command's own arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = Annotated[float, typer.Option(min=1, help="Seconds that ranks wait for one another.")]


def relaunch(ranks: int) -> int:
    """Runs this command again under torchrun; its exit status. An interrupt reaches every rank, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "vdcore.cli", *sys.argv[1:]]
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1)), **os.environ}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    interrupted = False

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        process.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if interrupted else status


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
