"""The CUDA kernels: their module, what it can run, and arguments as it takes them.

They run on a GPU, or on CPU tensors under their emulator, which is for tests.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import KINDS, QKNorm
from vdcore.ops.native import capsule
from vdcore.rope import STYLES, Rope

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
ROW_BYTES = 16  # a row starts at a multiple of this: what a lane loads
HOW_TO_BUILD = (
    "`make cuda` builds it in a checkout, VDCORE_CUDA=ON in an installation (unasked, where there are a GPU and nvcc)"
)


@cache
def emulated() -> bool:
    """``VDCORE_CUDA_EMULATE=1``: kernels run on CPU tensors, thread by thread; in development installs, for tests."""
    return os.environ.get("VDCORE_CUDA_EMULATE", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    name = "vdcore._cuda_emulated" if emulated() else "vdcore._cuda"
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        how = "`make build` does that in a checkout" if emulated() else HOW_TO_BUILD
        return None, f"{name} is not built: {how}"
    except ImportError as error:
        return None, f"{name} cannot be loaded: {error}"


@cache
def missing() -> str | None:
    """The reason why no kernel can run on this machine, or None. Starts no CUDA: a process may fork after it."""
    reason = _load()[1]
    if reason is not None or emulated():
        return reason
    return None if torch.cuda.device_count() else "no CUDA device"


@cache
def _why_not_device(index: int) -> str | None:
    reason: str | None = kernels().why_not_device(index)
    return reason


def most_shared_memory(device: torch.device) -> int:
    """Bytes that a block of a kernel can ask for."""
    return _recording.shared if _recording.capability else _most_shared_memory(_index(device))


@cache
def _most_shared_memory(index: int) -> int:
    bytes_: int = kernels().most_shared_memory(index)
    return bytes_


def capability(x: Tensor) -> tuple[int, int] | None:
    """Of the GPU that kernels on the tensor run on; None under the emulator, which takes those of every GPU."""
    if _recording.capability or not x.is_cuda:
        return _recording.capability
    return torch.cuda.get_device_capability(x.device)


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def kernels() -> ModuleType:
    """The module with the kernels; only after :func:`missing` has returned None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def stream(x: Tensor) -> int:
    """The caller's stream on the tensor's device."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


@dataclass(frozen=True)
class Launch:
    """What would have been launched.

    Args:
        kernel: as C++ names it, template arguments and all.
        threads: of a block.
        shared: bytes of shared memory that a block asks for.
        cluster: blocks that run side by side.
        bytes: of the tensors of the call, each once.
    """

    kernel: str
    blocks: int
    threads: int
    shared: int
    cluster: int
    bytes: int


class _Recording(threading.local):
    capability: tuple[int, int] | None = None
    shared: int = 0


_recording = _Recording()


@contextmanager
def recording(capability: tuple[int, int], *, multiprocessors: int, shared: int) -> Iterator[list[Launch]]:
    """Calls of this thread, on CPU tensors, launch nothing: at the end, the list has what a GPU would have got.

    Args:
        capability: of the GPU, (9, 0) for sm_90.
        shared: bytes of shared memory that a block can ask for.
    """
    module, found = kernels(), list[Launch]()
    module.begin_recording(multiprocessors=multiprocessors, shared_memory=shared)
    _recording.capability, _recording.shared = capability, shared
    try:
        yield found
    finally:
        _recording.capability = None
        found += [Launch(*values) for values in module.end_recording()]


def why_not(x: Tensor) -> str | None:
    """Objections to a device, a dtype and a head dim."""
    device = "cpu" if emulated() or _recording.capability else "cuda"
    if x.device.type != device:
        return f"it runs on {device} tensors, and these are on {x.device}"
    reason = None if _recording.capability else _why_not_device(_index(x.device))
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    D = x.shape[-1]
    if D % 8 or D > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {D}"
    return None


def aligned(x: Tensor) -> bool:
    """Rows lie dense, and start at multiples of 16 bytes."""
    if not x.numel():
        return True
    each = ROW_BYTES // x.element_size()
    if x.stride(-1) != 1 or x.data_ptr() % ROW_BYTES:
        return False
    return all(stride % each == 0 for stride, size in zip(x.stride()[:-1], x.shape) if size > 1)


def why_not_rows(**tensors: Tensor) -> str | None:
    for name, x in tensors.items():
        if not aligned(x):
            return f"rows must start at multiples of {ROW_BYTES} bytes; {name} has strides {tuple(x.stride())}"
    return None


def why_not_mask(mask: FrameMask) -> str | None:
    if mask.clean or mask.shots:
        return "its kernels know windows of frames and sinks, no teacher forcing (clean) and no shots"
    return None


def why_not_norm(norm: QKNorm | None) -> str | None:
    return "it has no norm over all heads" if norm is not None and norm.over == "all" else None


def rows(x: Tensor) -> Tensor:
    """An incoming gradient as kernels read it: copied where its rows are not dense and aligned."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _floats(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    x = x.detach().to(torch.float32).contiguous()
    return x if x.data_ptr() % ROW_BYTES == 0 else x.clone()


def norm_rope(norm: QKNorm | None, rope: Rope | None) -> dict[str, Any]:
    """Norm and RoPE as the module takes them; capsules keep alive what they point to."""
    found: dict[str, Any] = {"norm": None, "rope": None}
    if norm is not None:
        weights = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
        found["norm"] = (KINDS[norm.kind], norm.eps, *(capsule(_floats(x)) for x in weights))
    if rope is not None:
        tables = (x if x.ndim == 4 else x.unsqueeze(2) for x in (rope.cos, rope.sin))
        found["rope"] = (STYLES[rope.style], *(capsule(_floats(x)) for x in tables))
    return found


def int64(lengths: Tensor | None) -> object:
    """Lengths, which may be int32, as kernels read them."""
    return None if lengths is None else capsule(lengths.to(torch.int64).contiguous())
