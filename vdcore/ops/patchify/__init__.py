"""3D patch embedding and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vdcore.ops import check
from vdcore.ops.call import Call, empty
from vdcore.ops.operator import by_formula, register, run
from vdcore.ops.patchify import cpu, reference, tangents, triton

ORDERS = ("pt ph pw c", "c pt ph pw")


@dataclass
class PatchifyCall(Call):
    """video ``(B, C, T, H, W)``, weight ``(E, C, pt, ph, pw)``, bias ``(E,)``."""

    op: ClassVar[str] = "patchify"

    video: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def is_empty(self) -> bool:
        return self.video.numel() == 0 or self.weight.numel() == 0

    def empty_outputs(self) -> tuple[Tensor]:
        B, _, T, H, W = self.video.shape
        E, _, pt, ph, pw = self.weight.shape
        return (empty(self.video, (B, T // pt, (H // ph) * (W // pw), E)),)


@dataclass
class UnpatchifyCall(Call):
    """tokens ``(B, T', H'*W', E)``, weight ``(channels*pt*ph*pw, E)``, bias ``(channels*pt*ph*pw,)``."""

    op: ClassVar[str] = "unpatchify"

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    channels: int
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    order: str

    @property
    def is_empty(self) -> bool:
        return self.tokens.numel() == 0 or self.weight.numel() == 0

    def empty_outputs(self) -> tuple[Tensor]:
        (pt, ph, pw), (T, H, W) = self.patch, self.grid
        return (empty(self.tokens, (self.tokens.shape[0], self.channels, T * pt, H * ph, W * pw)),)


def patchify(video: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Embeds 3D patches: ``conv3d`` with stride = kernel, flattened.

    Args:
        video: ``(B, C, T, H, W)``; T, H, W are multiples of the patch.
        weight: ``(E, C, pt, ph, pw)``, as ``torch.nn.Conv3d`` has it.
        bias: ``(E,)``.
        backend: run on this one or raise.

    Returns:
        Tokens ``(B, T/pt, (H/ph)*(W/pw), E)`` in the video's dtype.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    op = PatchifyCall.op
    video, weight, bias = check.autocast(
        check.check_tensor(op, "video", video),
        check.check_tensor(op, "weight", weight),
        None if bias is None else check.check_tensor(op, "bias", bias),
    )
    check.check_main(op, "video", video, "(B, C, T, H, W)")
    check.check_like(op, "weight", weight, video, "video")
    if weight.ndim != 5:
        check.wrong(op, "weight", "(E, C, pt, ph, pw)", check.shape_of(weight))
    check.check_shape(op, "weight", weight, (weight.shape[0], video.shape[1], *weight.shape[2:]), "(E, C, pt, ph, pw)")
    if bias is not None:
        check.check_like(op, "bias", bias, video, "video", or_float32=True)
        check.check_shape(op, "bias", bias, (weight.shape[0],), "(E,)")
    for axis, size, patch in zip(("frames T", "height H", "width W"), video.shape[2:], weight.shape[2:]):
        if patch == 0 or size % patch:
            check.wrong(op, "video", f"a multiple of the patch size {patch} in its {axis}", size)
    return run(PatchifyCall(video, weight, bias), backend)


def unpatchify(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    channels: int,
    patch: Sequence[int],
    grid: Sequence[int],
    order: str = "pt ph pw c",
    backend: str | None = None,
) -> Tensor:
    """Projects tokens to patches and lays them out as video.

    Args:
        tokens: ``(B, T', H'*W', E)``.
        weight: ``(channels*pt*ph*pw, E)``, rows in ``order``.
        bias: ``(channels*pt*ph*pw,)``, in the same order.
        channels: of the video.
        patch: ``(pt, ph, pw)``.
        grid: ``(T', H', W')``, tokens per axis.
        order: of the weight's rows, ``"pt ph pw c"`` or ``"c pt ph pw"``.
        backend: run on this one or raise.

    Returns:
        Video ``(B, channels, T'*pt, H'*ph, W'*pw)`` in the tokens' dtype.

    Raises:
        ValueError, TypeError: wrong shapes and values, wrong dtypes.
        BackendError: if the named backend cannot run the call.
    """
    op = UnpatchifyCall.op
    tokens, weight, bias = check.autocast(
        check.check_tensor(op, "tokens", tokens),
        check.check_tensor(op, "weight", weight),
        None if bias is None else check.check_tensor(op, "bias", bias),
    )
    tokens = check.unit_stride(check.check_main(op, "tokens", tokens, "(B, T', H'*W', E)"))
    sizes, counts = _triple(op, "patch", patch), _triple(op, "grid", grid)
    if order not in ORDERS:
        check.wrong(op, "order", " or ".join(map(repr, ORDERS)), repr(order))
    B, _, _, E = tokens.shape
    check.check_shape(op, "tokens", tokens, (B, counts[0], counts[1] * counts[2], E), "(B, T', H'*W', E)")
    rows = channels * sizes[0] * sizes[1] * sizes[2]
    check.check_like(op, "weight", weight, tokens, "tokens")
    check.check_shape(op, "weight", weight, (rows, E), "(channels*pt*ph*pw, E)")
    if bias is not None:
        check.check_like(op, "bias", bias, tokens, "tokens", or_float32=True)
        check.check_shape(op, "bias", bias, (rows,), "(channels*pt*ph*pw,)")
    return run(UnpatchifyCall(tokens, weight, bias, channels, sizes, counts, order), backend)


def _triple(op: str, name: str, value: Any) -> tuple[int, int, int]:
    value = tuple(value)
    if len(value) != 3:
        check.wrong(op, name, "three sizes", value)
    return value


register(
    patchify,
    PatchifyCall,
    tangents.patchify,
    reference=by_formula(reference.patchify),
    cpu=cpu.PATCHIFY,
    triton=triton.PATCHIFY,
)
register(
    unpatchify,
    UnpatchifyCall,
    tangents.unpatchify,
    reference=by_formula(reference.unpatchify),
    cpu=cpu.UNPATCHIFY,
    triton=triton.UNPATCHIFY,
)
