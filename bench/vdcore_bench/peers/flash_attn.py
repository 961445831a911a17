"""FlashAttention 2 and 3."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from vdcore_bench.jobs.base import Job
from vdcore_bench.peers.adapter import Makers, dense_only, masked, unit, whole_job
from vdcore_bench.peers.registry import ATTENTION, library, peer


def _variants(module: str, job: Job) -> Makers:
    function = importlib.import_module(module).flash_attn_func
    mask, arguments = job.mask, dict[str, Any]()
    windows = masked(job) and unit(job) == 1 and mask.chunk == 1 and not mask.sink
    if windows:  # its rows are frames, so its windows are ours
        past, future = (-1 if x is None else x for x in (mask.past, mask.future))
        arguments = {"window_size": (past, future)}

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = function(q, k, v, softmax_scale=scale, **arguments)
        return out[0] if isinstance(out, tuple) else out

    return {"window": lambda: whole_job(job.op, attend)} if windows else dense_only(job, attend)


def _register(name: str, module: str) -> None:
    register = peer(name, ATTENTION, why_not=library(module), module=module)
    register(lambda job: _variants(module, job))


_register("flash-attn-2", "flash_attn")
_register("flash-attn-3", "flash_attn_interface")
