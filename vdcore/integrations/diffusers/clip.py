"""What the attention of one model shares: the mask, and how many frames the clip at hand has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from vdcore.integrations.swap import ServingHook
from vdcore.mask import FrameMask

Grid = tuple[int, int, int]


class Clip:
    """Shared by all processors of one model.

    Without a mask nothing depends on frames, and a clip is one long frame. With a mask, the model's forward tells how
    many frames its tokens are; attention looks that up by the number of tokens. So with gradient checkpointing run
    backward before a clip with as many tokens but other frames.

    Args:
        mask: which frames a frame sees; None: all.
    """

    def __init__(self, mask: FrameMask | None) -> None:
        self.mask = mask
        self._frames: dict[int, int] = {}
        self._seen: dict[str, tuple[Any, int, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}  # a weak reference neither copies nor pickles

    @property
    def frame_mask(self) -> FrameMask:
        return FrameMask() if self.mask is None else self.mask

    def split(self, tokens: int) -> tuple[int, int]:
        """Frames and tokens per frame ``(T, S)`` of a sequence of video tokens."""
        if self.mask is None:
            return 1, tokens
        if tokens not in self._frames:
            raise RuntimeError(
                f"swap_in: attention over {tokens} tokens under {self.mask}, but the model's forward has announced "
                f"clips of {sorted(self._frames)} tokens only: call the model, not its blocks"
            )
        return self._frames[tokens], tokens // self._frames[tokens]

    def has(self, tokens: int) -> bool:
        """The model has announced a clip of so many tokens."""
        return tokens in self._frames

    @property
    def text_sees(self) -> str:
        """Under a causal mask text must not carry the future into the past."""
        return "text" if self.mask is not None and self.mask.future == 0 else "all"

    # ---- frames, from the model's forward ----

    def announce(self, grid: Grid) -> None:
        T, H, W = grid
        self._frames[T * H * W] = T

    # ---- what values say ----

    def once(self, look: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``look(x)``. The same tensor, as every block of a model gets it, is looked at once.

        Looking at values costs a synchronisation on a GPU, and is hidden from torch.compile.
        """
        return _once(self._seen, look, x)

    def key_lengths(self, mask: Tensor) -> Tensor | str | None:
        """As :func:`padding_lengths`."""
        return self.once(padding_lengths, mask)


@torch.compiler.disable
def _once(seen: dict[str, tuple[Any, int, Any]], look: Callable[[Tensor], Any], x: Tensor) -> Any:
    name = f"{look.__name__} {id(x)}"
    if name in seen and seen[name][0]() is x and seen[name][1] == x._version:
        return seen[name][2]
    for gone in [key for key, (tensor, _, _) in seen.items() if tensor() is None]:
        del seen[gone]
    found = look(x)
    seen[name] = ref(x), x._version, found
    return found


class Watch(ServingHook):
    """Learns the grid of tokens from every call of a model, and announces it to the clip."""

    def __init__(self, clip: Clip, grid: Callable[..., Grid]) -> None:
        self.clip = clip
        self.grid = grid

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clip.announce(self.grid(model, *args, **kwargs))


# Biases up to this leave nothing of a key after softmax: hosts write -10000, -inf or the dtype's lowest number.
_HIDDEN = -9000.0


def padding_lengths(mask: Tensor) -> Tensor | str | None:
    """Valid keys ``(B,)`` of a mask ``(B, ..., n)`` that hides the tail of each sample's keys, for all queries alike.

    The mask is boolean or a bias of 0 and very negative numbers. None if it hides nothing, the reason if it is of
    another kind.
    """
    if mask.ndim < 2 or mask.shape[1:-1].numel() > mask.shape[1] or (mask.ndim == 3 and mask.shape[1] != 1):
        return "the attention mask is not one of keys alone"
    if mask.ndim > 2:
        first = mask[:, :1]
        if mask.shape[1] > 1 and not bool((mask == first).all()):
            return "the attention mask differs between heads"
        mask = first
    rows = mask.reshape(mask.shape[0], mask.shape[-1])
    valid = rows if rows.dtype == torch.bool else rows == 0
    if bool(valid.all()):
        return None
    if rows.dtype != torch.bool and not bool((valid | (rows <= _HIDDEN)).all()):
        return "the attention mask weighs keys instead of hiding them"
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()) or not bool(valid[:, :1].all()):
        return "the attention mask hides keys that are not the last ones"
    return valid.sum(-1)


class TextPairs(NamedTuple):
    """A mask of pairs of text tokens: valid ones see valid ones, padding sees the first token or nothing."""

    lengths: Tensor  # (B,)
    first: bool


def text_pairs(mask: Tensor) -> TextPairs | str:
    """A dense mask ``(B, 1, n, n)`` as what hosts build it from, or the reason if it is of another kind."""
    reason = "self-attention with an attention mask that is not one of padding"
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return reason
    pairs, index = mask[:, 0], torch.arange(mask.shape[-1], device=mask.device)
    lengths = pairs[:, :1].sum(-1)  # (B, 1): what the first token sees
    valid = index < lengths
    expected = valid[:, :, None] & valid[:, None]
    for first in (False, True):
        if first:
            expected[:, :, 0] = True
        if torch.equal(pairs, expected):
            return TextPairs(lengths[:, 0], first)
    return reason


def pairs_agree(table: Tensor) -> bool:
    """A rotary table ``(..., R)`` has every angle twice, for neighbouring channels."""
    return bool(torch.equal(table[..., 0::2], table[..., 1::2]))


def samples_agree(table: Tensor) -> bool:
    """A table ``(B, ...)`` is the same for every sample."""
    return table.shape[0] == 1 or bool((table == table[:1]).all())


def causal_block(mask: Tensor) -> int | None:
    """Tokens per block of a dense mask ``(1, 1, N, N)`` under which every block sees itself and those before it."""
    n = mask.shape[-1]
    if mask.dtype != torch.bool or mask.shape != (1, 1, n, n) or n == 0:
        return None
    rows = mask[0, 0]
    block = int(rows[0].sum())
    if block == 0 or n % block:
        return None
    index = torch.arange(n, device=mask.device) // block
    return block if torch.equal(rows, index <= index[:, None]) else None
