"""Oracles of 3D patch embedding and its inverse."""

from __future__ import annotations

from torch import Tensor

from vdcore.norm import compute_dtype


def patchify(video: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """video ``(B, C, T, H, W)``, weight ``(E, C, pt, ph, pw)`` -> tokens ``(B, T/pt, (H/ph)*(W/pw), E)``."""
    dtype = compute_dtype(video.dtype)
    E, C, pt, ph, pw = weight.shape
    B, _, T, H, W = video.shape
    patches = video.to(dtype).reshape(B, C, T // pt, pt, H // ph, ph, W // pw, pw)
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, T // pt, (H // ph) * (W // pw), C * pt * ph * pw)
    tokens = patches @ weight.to(dtype).reshape(E, C * pt * ph * pw).T
    if bias is not None:
        tokens = tokens + bias.to(dtype)
    return tokens.to(video.dtype)


def unpatchify(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    channels: int,
    patch: tuple[int, int, int],
    grid: tuple[int, int, int],
    order: str,
) -> Tensor:
    """tokens ``(B, T', H'*W', E)``, weight ``(channels*pt*ph*pw, E)`` -> video ``(B, channels, T, H, W)``.

    The weight's rows come in ``order``; T, H, W are ``grid * patch``.
    """
    dtype = compute_dtype(tokens.dtype)
    (pt, ph, pw), (T, H, W), B = patch, grid, tokens.shape[0]
    patches = tokens.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        patches = patches + bias.to(dtype)
    if order == "pt ph pw c":
        video = patches.reshape(B, T, H, W, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    else:  # "c pt ph pw"
        video = patches.reshape(B, T, H, W, channels, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return video.reshape(B, channels, T * pt, H * ph, W * pw).to(tokens.dtype)
