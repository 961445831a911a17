"""3D patches: a video as a matrix with a row per token, and back; the products with it are the library's.

Bound by memory, and little of it: K = channels x patch values of a token (16 to 256) beside its E channels (thousands),
which the product moves. A program holds BM tokens with BK of their values, which lie in the video at offsets that are
sums of one number per token and one per value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.launch import Config, arch_of, cdiv, launch, pick, power_of_2


@dataclass(frozen=True)
class PatchConfig(Config):
    """values: of a program, tokens times places of a patch; k: places at most."""

    values: int = 4096
    k: int = 64


CONFIGS = (
    PatchConfig("interpreter", 4, 1, "several tiles in a small case", 256, 16),
    PatchConfig("", 4, 1, "32 values a thread: 16-byte rows of the matrix, 2 to 4 bytes of the video", 4096, 64),
)


class Video(NamedTuple):
    """``(B, C, T, H, W)`` and its strides."""

    p: Any
    b: Any
    c: Any
    t: Any
    h: Any
    w: Any


class Patch(NamedTuple):
    """Channels and patch sizes, constants; in that order a patch's values are, but with CHANNELS_LAST pt, ph, pw, C."""

    C: int
    pt: int
    ph: int
    pw: int
    CHANNELS_LAST: bool = False


@triton.jit
def _places(o_k, video, PATCH: tl.constexpr):
    """Of places o_k in a patch: where they are in the video, from its first value on."""
    if PATCH.CHANNELS_LAST:
        c, o = o_k % PATCH.C, o_k // PATCH.C
    else:
        volume: tl.constexpr = PATCH.pt * PATCH.ph * PATCH.pw
        c, o = o_k // volume, o_k % volume
    dw, dh, dt = o % PATCH.pw, o // PATCH.pw % PATCH.ph, o // (PATCH.pw * PATCH.ph)
    o_video = c.to(tl.int64) * video.c + dt.to(tl.int64) * video.t
    return o_video + dh.to(tl.int64) * video.h + dw.to(tl.int64) * video.w


@triton.jit(do_not_specialize=["T", "H", "W", "count"])
def patch_matrix_kernel(
    video,
    p_patches,
    T,
    H,
    W,
    count,
    PATCH: tl.constexpr,
    BM: tl.constexpr,  # tokens
    BK: tl.constexpr,  # places of a patch
    GATHER: tl.constexpr,  # from the video into the matrix, else back
):
    """One program: BK places of the patches of BM tokens. video: Video. p_patches: (count, K), contiguous. T, H, W:
    cells of the video; count: of all samples.
    """
    K: tl.constexpr = PATCH.C * PATCH.pt * PATCH.ph * PATCH.pw
    columns: tl.constexpr = (K + BK - 1) // BK
    o_m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    m = (o_m < count)[:, None] & (o_k < K)[None, :]
    b, t, h, w = o_m // W // H // T, o_m // W // H % T, o_m // W % H, o_m % W
    o_video = b.to(tl.int64) * video.b + t.to(tl.int64) * (PATCH.pt * video.t)
    o_video += h.to(tl.int64) * (PATCH.ph * video.h) + w.to(tl.int64) * (PATCH.pw * video.w)
    p_video = video.p + (o_video[:, None] + _places(o_k, video, PATCH)[None, :])
    p_matrix = p_patches + (o_m.to(tl.int64)[:, None] * K + o_k[None, :])
    if GATHER:
        tl.store(p_matrix, tl.load(p_video, mask=m), mask=m)
    else:
        tl.store(p_video, tl.load(p_matrix, mask=m), mask=m)


def _move(video: Tensor, patches: Tensor, patch: Patch, *, gather: bool) -> None:
    _, _, T, H, W = video.shape
    config = pick(CONFIGS, arch_of(video))
    count, K = patches.shape
    BK = min(power_of_2(K), config.k)
    BM = config.values // BK
    launch(
        patch_matrix_kernel,
        cdiv(count, BM) * cdiv(K, BK),
        like=video,
        config=config,
        video=Video(video, *video.stride()),
        p_patches=patches,
        T=T // patch.pt,
        H=H // patch.ph,
        W=W // patch.pw,
        count=count,
        PATCH=patch,
        BM=BM,
        BK=BK,
        GATHER=gather,
    )


def gather_patches(video: Tensor, patch: Patch) -> Tensor:
    """Video ``(B, C, T, H, W)`` -> ``(tokens, C*pt*ph*pw)``, tokens in the order B, T', H', W'."""
    K = math.prod(patch[:4])
    patches = torch.empty(video.numel() // K, K, dtype=video.dtype, device=video.device)
    _move(video, patches, patch, gather=True)
    return patches


def scatter_patches(patches: Tensor, video: Tensor, patch: Patch) -> None:
    """Fills the video from a contiguous ``(tokens, C*pt*ph*pw)``."""
    _move(video, patches, patch, gather=False)
