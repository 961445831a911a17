"""The Triton kernels: what they can run, and room for gradients. They run on a GPU, or interpreted on CPU tensors.

Kernels are imported where they are launched: ``import vdcore`` imports no triton.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from vdcore import extras
from vdcore.norm import QKNorm
from vdcore.ops.call import AttentionCall, Triple, empty_like
from vdcore.ops.check import unit_stride

MAX_HEAD_DIM = 256
MAX_BOX_DIM = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Versions of Triton whose results are wrong, with the kernel and the configuration that shows it.
VERSION_DENYLIST: dict[str, str] = {}


@cache
def interpreted() -> bool:
    """Triton decides this once, when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def missing() -> str | None:
    if not extras.installed("triton"):
        return "triton is not installed"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = ""
    if installed in VERSION_DENYLIST:
        return f"triton {installed} gives wrong results: {VERSION_DENYLIST[installed]}"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU is visible to torch (with TRITON_INTERPRET=1 the kernels run on the CPU, interpreted)"
    return None


@cache
def _too_old(index: int) -> str | None:
    """The reason why a GPU is one of those that kernels are not compiled for."""
    if torch.version.hip or (capability := torch.cuda.get_device_capability(index)) >= (8, 0):
        return None
    return "it needs compute capability 8.0, and the GPU has {}.{}".format(*capability)


def why_not(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    if x.device.type == "cuda":
        return _too_old(x.device.index)
    if x.device.type == "cpu" and interpreted():
        return "Triton's interpreter multiplies bfloat16 matrices wrongly" if x.dtype == torch.bfloat16 else None
    return f"it runs on a GPU, and the tensors are on {x.device}"


def why_not_head(q: Tensor) -> str | None:
    return None if q.shape[-1] <= MAX_HEAD_DIM else f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"


def why_not_boxes(q: Tensor) -> str | None:
    """Of windows and listed tiles: where a box lies takes registers that more channels would need."""
    D = q.shape[-1]
    return None if D <= MAX_BOX_DIM else f"head_dim of windows and tiles must be at most {MAX_BOX_DIM}, got {D}"


def why_not_tangents(q: Tensor) -> str | None:
    """Of frame attention: where a product of float32 is one of plain numbers, more channels spill."""
    from vdcore_kernels.frame_attention.tangents import MAX_FLOAT32

    if q.dtype != torch.float32 or q.shape[-1] <= MAX_FLOAT32:
        return None
    return f"its tangents of float32 have at most {MAX_FLOAT32} channels, got {q.shape[-1]}"


def why_not_norm(q: Tensor, k: Tensor, norm: QKNorm | None) -> str | None:
    from vdcore_kernels.core.tile import MAX_TOKEN, norm_fits

    if all(norm_fits(x.shape[-2], x.shape[-1], norm) for x in (q, k)):
        return None
    return f"a norm over all heads holds at most {MAX_TOKEN} channels of a token"


def why_not_tokens(*tensors: Tensor) -> str | None:
    """Limits of tiles of tokens: their numbers, and their offsets in a tile, have 32 bits."""
    if any(x.shape[1] * x.shape[2] >= 2**31 - 2**16 for x in tensors):
        return "it counts the tokens of a sample in 32 bits"
    if any(x.shape[3] * x.shape[4] >= 2**22 for x in tensors):
        return "it has less than 2**22 channels per token, all heads together"
    return None


def output_gradients(out: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """dout of unit stride, zeros where there is none, and dlse, contiguous."""
    dout = torch.zeros_like(out) if grads[0] is None else unit_stride(grads[0])
    return dout, None if grads[1] is None else grads[1].contiguous()


def qkv_gradients(c: AttentionCall) -> tuple[dict[str, Tensor], Triple]:
    """Room for the gradients by name, and for those of q, k and v: slices of one tensor where the call is packed."""
    if c.packed is not None:
        packed = empty_like(c.packed)
        q, k, v = packed.unbind(3)
        return {"q": packed}, (q, k, v)
    q, k, v = empty_like(c.q), empty_like(c.k), empty_like(c.v)
    return {"q": q, "k": k, "v": v}, (q, k, v)
