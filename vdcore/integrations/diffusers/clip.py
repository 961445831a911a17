"""What the attention of one model shares: the mask, and how many frames the clip at hand has.

What belongs to one call of the model, its grid above all, is in a context variable: two threads, or two clips whose
backward runs after both, never see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from vdcore.integrations.diffusers.ranks.mesh import Ranks
from vdcore.integrations.report import TURN
from vdcore.integrations.swap import ServingHook
from vdcore.mask import FrameMask
from vdcore.models.layout import Split

Grid = tuple[int, int, int]
Seen = dict[str, tuple[Any, int, Any]]


class Scope(NamedTuple):
    """One call of a model.

    Args:
        grid: of its tokens, where a mask needs it, or ranks that share the clip: of this rank's then.
        seen: what values of tensors said.
        outer: the call of another model that it is part of.
        whole: frames of the whole clip, where ranks share it.
    """

    clip: Clip
    grid: Grid | None
    seen: Seen
    outer: Scope | None
    whole: int | None = None


_scope: ContextVar[Scope | None] = ContextVar("vdcore.integrations.diffusers.scope", default=None)


class Clip:
    """Shared by all processors of one model.

    Without a mask nothing depends on frames, and a clip is one long frame. With a mask, a call of the model tells how
    many frames its tokens are. A block that is compiled on its own looks that up by the number of tokens, as long as
    that is not ambiguous.

    Args:
        mask: which frames a frame sees; None: all.
        frames: of the one clip that it is for; None: of the call of the model.
        ranks: the processes that share the clip; None: this one has it.
    """

    def __init__(self, mask: FrameMask | None, frames: int | None = None, ranks: Ranks | None = None) -> None:
        self.mask = mask
        self.frames = frames
        self.ranks = ranks
        self._frames: list[tuple[int, int, int]] = []  # tokens and frames of clips so far, and of the whole clips

    @property
    def bound(self) -> str | None:
        """What a call that is left to the host would get wrong; None: nothing."""
        found = [str(x) for x in (self.mask, self.ranks) if x is not None]
        return " and ".join(found) or None

    @property
    def frame_mask(self) -> FrameMask:
        return FrameMask() if self.mask is None else self.mask

    def split(self, tokens: int) -> tuple[int, int]:
        """Frames and tokens per frame ``(T, S)`` of a sequence of video tokens; of this rank's."""
        if self.bound is None:
            return 1, tokens
        found = self._frames_of(tokens)
        if len(found) != 1:
            either = f", either of {' or '.join(map(str, found))} frames," if found else ""
            raise RuntimeError(
                f"swap_in: attention over {tokens} tokens{either} under {self.bound}, outside of a call of the model "
                f"that tells how many frames they are: call the model, not its blocks or its forward(), and checkpoint "
                f"with its own enable_gradient_checkpointing()"
            )
        return found[0], tokens // found[0]

    def has(self, tokens: int) -> bool:
        """The model has announced a clip of so many tokens."""
        return bool(self._frames_of(tokens))

    @property
    def text_sees(self) -> str:
        """Under a causal mask text must not carry the future into the past."""
        return "text" if self.mask is not None and self.mask.future == 0 else "all"

    # ---- frames, from the model's forward ----

    def announce(self, grid: Grid, whole: int | None = None) -> None:
        T, H, W = grid
        found = T * H * W, T, T if whole is None else whole
        if torch.compiler.is_compiling():
            self._frames = [found]  # what is traced is this call
        elif found not in self._frames:
            self._frames = [*self._frames, found]

    def shared(self, frames: int, tokens: int) -> Split | None:
        """How ranks share the clip of which this one has ``frames`` frames of ``tokens``; None: they do not."""
        if self.ranks is None:
            return None
        scope = self._scope()
        if scope is not None:
            found = {scope.whole}
        else:
            found = {whole for _, T, whole in self._frames if frames == T and torch.compiler.is_compiling()}
        whole = found.pop() if len(found) == 1 else None
        if whole is None or self.ranks.peers.size(whole) != frames:
            raise RuntimeError(
                f"swap_in: {frames} frames under {self.bound}, outside of a call of the model that tells how many the "
                f"whole clip has: call the model, not its blocks, and checkpoint with its own "
                f"enable_gradient_checkpointing()"
            )
        return Split(self.ranks.peers, (whole, tokens), "switch")

    def _frames_of(self, tokens: int) -> list[int]:
        """The frames of a clip of so many tokens: none or several where they are not known."""
        if self.frames is not None:
            return [self.frames]
        scope = self._scope()
        if scope is not None and scope.grid is not None:
            T, H, W = scope.grid
            return [T] if tokens == T * H * W else []
        if torch.compiler.is_compiling():  # a block on its own is guarded by what its model has announced
            return sorted({frames for n, frames, _ in self._frames if n == tokens})
        return []

    def _scope(self) -> Scope | None:
        """The call of this clip's model that runs; none where a compiler traces it, which knows no such variables."""
        scope = None if torch.compiler.is_compiling() else _scope.get()
        while scope is not None and scope.clip is not self:
            scope = scope.outer
        return scope

    # ---- what values say ----

    def once(self, look: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``look(x)``; None where values must not be looked at.

        The same tensor, as every block of a model gets it, is looked at once a call: that costs a synchronization on a
        GPU. What it said is not good for the next call: not all that writes to a tensor counts as a version of it.
        """
        if not may_look(x):
            return None
        scope = self._scope()
        seen = {} if scope is None else scope.seen
        version = 0 if x.is_inference() else x._version
        name = f"{look.__name__} {id(x)}"
        known = seen.get(name)
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        found = look(x)
        seen[name] = ref(x), version, found
        return found

    def valid_keys(self, mask: Tensor) -> Keys | str | None:
        """Which keys a mask ``(B, ..., n)`` leaves, None for all; or the reason why it is not one of keys to hide."""
        return self.once(look_at_keys, mask) if may_look(mask) else keys_unseen(mask)


def may_look(x: Tensor) -> bool:
    """The values of a tensor may be read here: nobody traces, captures or transforms the call."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter, nn.Buffer) or x.is_meta:
        return False
    if torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


class Watch(ServingHook):
    """Opens a scope for every call of a model, with the grid of its tokens.

    Args:
        grid: finds it from the arguments of the model's forward; None: no mask needs it.
    """

    def __init__(self, clip: Clip, grid: Callable[..., Grid] | None) -> None:
        self.clip = clip
        self.grid = grid
        self.attending = 0  # modules whose attention the mask restricts

    def count(self, model: nn.Module) -> int:
        """Attention modules that share the clip."""
        processors = (getattr(module, "processor", None) for module in model.modules())
        return sum(getattr(processor, "clip", None) is self.clip for processor in processors)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = None if self.grid is None else self.grid(module, *args, **kwargs)
        if grid is not None:
            self.clip.announce(grid)
        if torch.compiler.is_compiling():
            return
        bound = grid is not None or self.clip.ranks is not None
        if bound and self.count(module) < self.attending:
            raise RuntimeError(
                f"swap_in: attention or its processor was replaced since the swap, and cannot run under "
                f"{self.clip.bound}: swap in again"
            )
        if self.clip.ranks is not None and self.clip.ranks.parts and TURN.is_hosts:
            raise ValueError("check: the host has no way to run a rank's part of a clip: swap in without parts")
        if bound and torch.is_grad_enabled():
            checkpoint_in_scope(module)
        _scope.set(Scope(self.clip, grid, {}, _scope.get()))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        scope = None if torch.compiler.is_compiling() else _scope.get()
        if scope is not None and scope.clip is self.clip:
            _scope.set(scope.outer)


@contextmanager
def in_scope(clip: Clip, grid: Grid, whole: int) -> Iterator[None]:
    """A call of a model on this rank's part of a clip, ``grid``, of which the whole has ``whole`` frames."""
    clip.announce(grid, whole)
    token = _scope.set(Scope(clip, grid, {}, _scope.get(), whole))
    try:
        yield
    finally:
        _scope.reset(token)


# ---- Blocks that run again in backward ----

CHECKPOINT = "_gradient_checkpointing_func"


class InScope:
    """The host's gradient checkpointing; a block runs again in the call that it ran in."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(block, *args)
        return self.checkpoint(partial(_run_in, _scope.get(), block), *args)


def _run_in(scope: Scope | None, block: Callable[..., Any], *args: Any) -> Any:
    token = _scope.set(scope)
    try:
        return block(*args)
    finally:
        _scope.reset(token)


def checkpoint_in_scope(model: nn.Module) -> None:
    for module in model.modules():
        checkpoint = module.__dict__.get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, InScope):
            module.__dict__[CHECKPOINT] = InScope(checkpoint)


def checkpoint_as_host(model: nn.Module) -> None:
    """Undoes :func:`checkpoint_in_scope`."""
    for module in model.modules():
        checkpoint = module.__dict__.get(CHECKPOINT)
        if isinstance(checkpoint, InScope):
            module.__dict__[CHECKPOINT] = checkpoint.checkpoint


# ---- Masks of keys ----

# Biases up to this leave nothing of a key after softmax: hosts write -10000, -inf or the dtype's lowest number.
_HIDDEN = -9000.0


class Keys(NamedTuple):
    """The valid keys of each sample: the first ``lengths`` of them, once they are in this order.

    Attention does not mind the order of keys, so that a mask may hide any of them.
    """

    lengths: Tensor  # (B,)
    order: Tensor | None = None  # (B, n), valid ones first; None: they are

    def expand(self, batch: int) -> Keys:
        order = None if self.order is None else self.order.expand(batch, -1)
        return Keys(self.lengths.expand(batch), order)

    def sort(self, x: Tensor) -> Tensor:
        """``(B, n, ...)`` in this order."""
        if self.order is None:
            return x
        return x.gather(1, self._index(x))

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`sort`."""
        return x if self.order is None else torch.empty_like(x).scatter(1, self._index(x), x)

    def _index(self, x: Tensor) -> Tensor:
        assert self.order is not None
        return self.order.view(*self.order.shape, *[1] * (x.ndim - 2)).expand_as(x)


def _rows(mask: Tensor) -> Tensor | str:
    """A mask ``(B, ..., n)`` as ``(B, n)``, or as ``(B, H, n)`` where heads may differ; or why it has no such form."""
    if mask.ndim < 2 or mask.shape[1:-1].numel() > mask.shape[1] or (mask.ndim == 3 and mask.shape[1] != 1):
        return "the attention mask is not one of keys alone"
    if mask.ndim == 2 or mask.shape[1] == 1 or mask.stride(1) == 0:
        return mask if mask.ndim == 2 else mask[:, 0].reshape(mask.shape[0], mask.shape[-1])
    return mask.reshape(mask.shape[0], mask.shape[1], mask.shape[-1])


def look_at_keys(mask: Tensor) -> Keys | str | None:
    """As :meth:`Clip.valid_keys`, from the mask's values: booleans, or biases of 0 and very negative numbers."""
    rows = _rows(mask)
    if isinstance(rows, str):
        return rows
    if rows.ndim == 3:
        if not bool((rows == rows[:, :1]).all()):
            return "the attention mask differs between heads"
        rows = rows[:, 0]
    valid = rows if rows.dtype == torch.bool else rows == 0
    if bool(valid.all()):
        return None
    if rows.dtype != torch.bool and not bool(_hides(rows, valid).all()):
        return "the attention mask weighs keys instead of hiding them"
    in_order = not bool((valid[:, 1:] & ~valid[:, :-1]).any())
    return Keys(valid.sum(-1), None if in_order else _order(valid))


def keys_unseen(mask: Tensor) -> Keys | str:
    """As :meth:`Clip.valid_keys`, of a mask whose values nobody knows yet. One that weighs keys fails when it runs."""
    rows = _rows(mask)
    if isinstance(rows, str):
        return rows
    if rows.ndim == 3:
        return "the attention mask may differ between heads, which its values would tell"
    if rows.dtype == torch.bool:
        return Keys(rows.sum(-1), _order(rows))
    valid = rows == 0
    torch._assert_async(
        _hides(rows, valid).all(),
        "swap_in: an attention mask must be 0 or hide keys, some of them, where values are not known when it is traced",
    )
    return Keys(valid.sum(-1), _order(valid))


def _hides(rows: Tensor, valid: Tensor) -> Tensor:
    """Biases ``(B, n)`` hide what is not valid; all keys of a sample only if infinite: softmax drops a common bias."""
    return (valid | (rows <= _HIDDEN)) & (valid.any(-1, keepdim=True) | torch.isinf(rows))


def _order(valid: Tensor) -> Tensor:
    return valid.to(torch.uint8).argsort(stable=True, dim=-1, descending=True)


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
