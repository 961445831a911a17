"""The processes that share a clip, from a mesh of the user's or from diffusers' configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vdcore.parallel.peers import Peers, peers_of
from vdcore.parallel.plan import VIDEO

try:
    from diffusers.models._modeling_parallel import ContextParallelConfig
except ImportError:  # before diffusers had it
    ContextParallelConfig: Any = None  # type: ignore[no-redef]

DIMS = ("ring", "ulysses")  # of diffusers' meshes


@dataclass(frozen=True)
class Ranks:
    """How processes share the clips of a model.

    Args:
        plan: of attention over all frames; None: by bytes.
        parts: each passes and gets its frames; else every rank the whole clip.
    """

    peers: Peers
    plan: str | None = None
    parts: bool = False

    def __str__(self) -> str:
        return f"a mesh of {self.peers.ranks} ranks"


def ranks_of(mesh: Any, plan: str | None, parts: bool) -> Ranks | None:
    """
    Raises:
        ValueError, TypeError: a mesh of several dimensions, of other processes, or none; an unknown plan.
    """
    if isinstance(mesh, Ranks):  # as a model was swapped before
        return mesh
    if mesh is None:
        if plan is not None or parts:
            given = "plan" if plan is not None else "parts"
            raise ValueError(f"swap_in: {given} must be left out without a mesh, got {plan if plan else parts!r}")
        return None
    if plan is not None and plan not in VIDEO:
        raise ValueError(f"swap_in: plan must be one of {', '.join(VIDEO)}, or None, got {plan!r}")
    return Ranks(peers_of("swap_in", _one_dimensional(mesh)), plan, parts)


def _one_dimensional(mesh: Any) -> Any:
    """A mesh of one dimension as it is, diffusers' ``("ring", "ulysses")`` as one dimension."""
    config = getattr(mesh, "context_parallel_config", mesh)
    if config is None:
        raise ValueError("swap_in: mesh must be for context parallelism, got a configuration without it")
    if ContextParallelConfig is not None and isinstance(config, ContextParallelConfig):
        if config._flattened_mesh is not None:
            return config._flattened_mesh
        config = config.mesh if config.mesh is not None else _new_mesh(config)
    if getattr(config, "ndim", 1) > 1 and set(DIMS) <= set(config.mesh_dim_names or ()):
        return config[DIMS]._flatten()
    return config


def _new_mesh(config: Any) -> Any:
    """What diffusers makes of a configuration without a mesh: one of all processes."""
    if not dist.is_initialized():
        raise RuntimeError("swap_in: mesh needs torch.distributed.init_process_group() first, or a DeviceMesh")
    ranks = config.ring_degree * config.ulysses_degree
    if ranks != dist.get_world_size():
        degrees = f"ring_degree * ulysses_degree = {ranks} of {dist.get_world_size()} processes"
        raise ValueError(f"swap_in: mesh must be given in the configuration for {degrees}")
    found = torch.accelerator.current_accelerator()
    device = "cpu" if found is None or dist.get_backend() == "gloo" else found.type
    return dist.device_mesh.init_device_mesh(device, config.mesh_shape, mesh_dim_names=DIMS)
