"""What a mask of a swap may be: one for all heads, pairs of a number of heads and a mask, or one of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vdcore.grid_mask import GridMask
from vdcore.mask import FrameMask

One = FrameMask | GridMask
Mask = One | tuple[tuple[int, One], ...]
# By layer, as they are named or numbered; layers that are not named are dense.
Masks = Mask | Mapping[int | str, Mask | None]

EXPECTED = "a FrameMask, a GridMask, pairs (heads, mask), a dict of these by layer, or None"


def check_mask(mask: Any) -> None:
    """Raises if it is no mask of a swap."""
    if mask is None:
        return
    if isinstance(mask, Mapping):
        for layer, one in mask.items():
            if isinstance(one, Mapping) or isinstance(layer, bool) or not isinstance(layer, (int, str)):
                raise TypeError(f"swap_in: mask must be {EXPECTED}, got {layer!r} of a layer")
            check_mask(one)
    elif isinstance(mask, tuple):
        for pair in mask:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], One)):
                raise TypeError(f"swap_in: mask must be {EXPECTED}, got {pair!r} in a tuple")
            if isinstance(pair[0], bool) or not isinstance(pair[0], int) or pair[0] < 1:
                raise ValueError(f"swap_in: mask must count at least one head in every pair, got {pair[0]!r}")
    elif not isinstance(mask, One):
        raise TypeError(f"swap_in: mask must be {EXPECTED}, got {type(mask).__name__}")


def each(mask: Masks | None) -> Iterator[One]:
    """All the masks in it."""
    if isinstance(mask, Mapping):
        for one in mask.values():
            yield from each(one)
    elif isinstance(mask, tuple):
        yield from (one for _, one in mask)
    elif mask is not None:
        yield mask


def frames_of(mask: Masks) -> list[FrameMask]:
    """What they say of frames."""
    return [one if isinstance(one, FrameMask) else one.frames for one in each(mask)]


def has_grid(mask: Masks) -> bool:
    """Some of it is in rows and columns."""
    return any(isinstance(one, GridMask) for one in each(mask))


def mask_text(mask: Masks | None) -> str:
    """For errors: long radii are cut."""
    text = repr(mask)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
