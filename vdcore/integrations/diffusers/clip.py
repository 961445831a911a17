"""What the attention of one model shares: the mask, and the grid of the clip at hand.

What belongs to one call of the model, its grid above all, is in a context variable: two threads, or two clips whose
backward runs after both, never see each other's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from vdcore.integrations.diffusers.masks import Mask, Masks, frames_of, has_grid, mask_text
from vdcore.integrations.diffusers.ranks.mesh import Ranks
from vdcore.integrations.diffusers.switch import Switch
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
        dense: the mask is not in force in it.
        whole: frames of the whole clip, where ranks share it.
    """

    clip: Clip
    grid: Grid | None
    seen: Seen
    outer: Scope | None
    dense: bool = False
    whole: int | None = None


_scope: ContextVar[Scope | None] = ContextVar("vdcore.integrations.diffusers.scope", default=None)


class Clip:
    """Shared by all processors of one model; layers with a mask of their own have one of their own beside it.

    Without a mask nothing depends on frames, and a clip is one long frame. With a mask, a call of the model tells which
    grid its tokens are. A block that is compiled on its own looks that up by the number of tokens, as long as that is
    not ambiguous.

    Args:
        given: what a token sees; None: all.
        frames: of the one clip that it is for; None: of the call of the model.
        of: the model's clip, whose calls are this one's; None: this is the model's.
        beside: the model's clip, of whose swap this one is, for other tokens.
        ranks: the processes that share the model's clips; None: this one has them.
    """

    # Is shown what every attention over the clip gets: q, k, v in frames, rows and columns, and the other arguments.
    probe: Callable[..., None] | None = None

    def __init__(
        self,
        given: Masks | None,
        frames: int | None = None,
        of: Clip | None = None,
        beside: Clip | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.given = given
        self.frames = frames
        self.root: Clip = self if of is None else of
        self.swapped: Clip = beside or self.root
        self.is_over = False
        self.switch: Switch = Switch() if of is None else of.switch
        self.ranks: Ranks | None = ranks if of is None else of.ranks
        self._grids: list[Grid] = []  # of clips so far
        self._wholes: dict[int, int] = {}  # by frames of this rank's part, those of the clip that was last called with

    @property
    def is_swapped_out(self) -> bool:
        """The model was, and whoever has kept a processor of the swap has the host's."""
        return self.swapped.is_over

    @property
    def mask(self) -> Mask | None:
        """The mask that is in force in this call; None: all tokens see one another."""
        given: Any = self.given  # of a model whose layers have masks of their own all of them, which nobody asks for
        if given is None:
            return None
        if torch.compiler.is_compiling():
            return None if self.switch.is_dense else given
        scope = self._scope()
        return None if scope is not None and scope.dense else given

    @property
    def is_bound(self) -> bool:
        """Attention over the clip that is left to the host would be wrong: there is a mask, or others have frames."""
        return self.ranks is not None or self.mask is not None

    @property
    def under(self) -> str:
        """What it is bound by."""
        found = [] if self.given is None else [mask_text(self.given)]
        return " and ".join([*found, *([] if self.ranks is None else [str(self.ranks)])])

    @property
    def frame_mask(self) -> FrameMask:
        """Of attention across frames at one position."""
        mask = self.mask
        assert mask is None or isinstance(mask, FrameMask)
        return FrameMask() if mask is None else mask

    def masking(self, tokens: int) -> dict[str, Any]:
        """What attention over a sequence of video tokens is told of the mask, by argument."""
        mask = self.mask
        if mask is None:
            return {"mask": FrameMask()}
        return {"mask": mask, "grid": self.grid(tokens)} if has_grid(mask) else {"mask": mask}

    def split(self, tokens: int) -> tuple[int, int]:
        """Frames and tokens per frame ``(T, S)`` of a sequence of video tokens; of this rank's."""
        if not self.is_bound:
            return 1, tokens
        found = list(dict.fromkeys(self._frames_of(tokens)))
        if len(found) != 1:
            raise self._unknown(tokens, found, "frames")
        return found[0], tokens // found[0]

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of a frame in a sequence of video tokens."""
        found = self._grids_of(tokens)
        if len(found) != 1:
            raise self._unknown(tokens, found, "frames, rows and columns")
        return found[0][1:]

    def _unknown(self, tokens: int, found: list[Any], what: str) -> RuntimeError:
        scope = self._scope()
        if scope is not None and scope.grid is not None:
            return RuntimeError(_changed(scope.grid, f"{tokens} tokens under {self.under}"))
        either = f", either of {' or '.join(map(str, found))} {what}," if found else ""
        return RuntimeError(
            f"swap_in: attention over {tokens} tokens{either} under {self.under}, outside of a call of the "
            f"model that tells how many {what} they are: call the model, not its blocks or its forward(), and "
            f"checkpoint with its own enable_gradient_checkpointing()"
        )

    def has(self, tokens: int) -> bool:
        """The model has announced a clip of so many tokens."""
        return bool(self._frames_of(tokens))

    @property
    def text_sees(self) -> str:
        """Under a causal mask text must not carry the future into the past."""
        mask = self.mask
        return "text" if mask is not None and all(x.future == 0 for x in frames_of(mask)) else "all"

    # ---- the grid, from the model's forward ----

    def announce(self, grid: Grid, whole: int | None = None) -> None:
        part, whole = grid[0], grid[0] if whole is None else whole
        if torch.compiler.is_compiling():
            self._grids, self._wholes = [grid], {part: whole}  # what is traced is this call
            return
        if grid not in self._grids:
            self._grids = [*self._grids, grid]
        if self._wholes.get(part) != whole:  # graphs of blocks are guarded by it
            self._wholes = {**self._wholes, part: whole}

    def shared(self, frames: int, tokens: int) -> Split | None:
        """How ranks share the clip of which this one has ``frames`` frames of ``tokens``; None: they do not."""
        if self.ranks is None:
            return None
        scope = self._scope()
        if scope is not None:
            whole = scope.whole
        else:
            whole = self.root._wholes.get(frames) if torch.compiler.is_compiling() else None
        if whole is None or self.ranks.peers.size(whole) != frames:
            raise RuntimeError(
                f"swap_in: {frames} frames under {self.under}, outside of a call of the model that tells how many the "
                f"whole clip has: call the model, not its blocks, and checkpoint with its own "
                f"enable_gradient_checkpointing()"
            )
        return Split(self.ranks.peers, (whole, tokens), "switch")

    def _frames_of(self, tokens: int) -> list[int]:
        """The frames of a clip of so many tokens: none or several where they are not known."""
        return [T for T, _, _ in self._grids_of(tokens)] if self.frames is None else [self.frames]

    def _grids_of(self, tokens: int) -> list[Grid]:
        """The grid of a clip of so many tokens: none or several where it is not known."""
        scope = self._scope()
        if scope is not None and scope.grid is not None:
            known = [scope.grid]
        elif torch.compiler.is_compiling():  # a block on its own is guarded by what its model has announced
            known = self.root._grids
        else:
            known = []
        return [(T, H, W) for T, H, W in known if tokens == T * H * W]

    def _scope(self) -> Scope | None:
        """The call of this clip's model that runs; none where a compiler traces it, which knows no such variables."""
        scope = None if torch.compiler.is_compiling() else _scope.get()
        while scope is not None and scope.clip is not self.root:
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


class Settings(NamedTuple):
    """What a model was swapped with."""

    mask: Masks | None
    dense_layers: tuple[int | str, ...]
    dense_steps: int
    ranks: Ranks | None = None


class Watch(ServingHook):
    """Opens a scope for every call of a model, with the grid of its tokens.

    Args:
        grid: finds it from the arguments of the model's forward; None: no mask needs it.
    """

    def __init__(self, clip: Clip, grid: Callable[..., Grid] | None, settings: Settings) -> None:
        self.clip = clip
        self.grid = grid
        self.settings = settings
        self.attending = 0  # modules whose attention the mask restricts

    def begin(self) -> None:
        self.clip.is_over = False

    def end(self) -> None:
        self.clip.is_over = True

    def of_clip(self, model: nn.Module) -> list[Any]:
        """Processors with the clip, or one beside it with a mask of its own; of every attention module."""
        processors = (getattr(module, "processor", None) for module in model.modules())
        clips = ((processor, getattr(processor, "clip", None)) for processor in processors)
        return [processor for processor, clip in clips if clip is not None and clip.root is self.clip]

    def count(self, model: nn.Module) -> int:
        """Attention modules under a mask or a mesh."""
        clips = (processor.clip for processor in self.of_clip(model))
        return sum(clip.given is not None or clip.ranks is not None for clip in clips)

    def has_all(self, model: nn.Module) -> bool:
        """Nothing that the mask or the mesh is for was replaced since the swap, or comes from another one."""
        return self.count(model) >= self.attending

    def in_places(self, model: nn.Module) -> bool:
        """No processor serves two modules: made for one, it would take tokens of a frame for frames in the other."""
        found = self.of_clip(model)
        return len({id(processor) for processor in found}) == len(found)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = None if self.grid is None else self.grid(module, *args, **kwargs)
        if grid is not None:
            self.clip.announce(grid)
        if torch.compiler.is_compiling():
            return
        bound = grid is not None or self.clip.ranks is not None
        moved = self.clip.given is not None and not self.in_places(module)
        if moved or (bound and not self.has_all(module)):
            raise RuntimeError(
                f"swap_in: attention or its processor was replaced since the swap, and cannot run under "
                f"{self.clip.under}: swap in again"
            )
        if self.clip.ranks is not None and self.clip.ranks.parts and TURN.is_hosts:
            raise ValueError("check: the host has no way to run a rank's part of a clip: swap in without parts")
        self.clip.switch.check()
        if bound and torch.is_grad_enabled():
            checkpoint_in_scope(module)
        _scope.set(Scope(self.clip, grid, {}, _scope.get(), self.clip.switch.is_dense))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        scope = _scope.get()
        if scope is None or scope.clip is not self.clip:
            return
        _scope.set(scope.outer)
        if output is None or self.grid is None or scope.grid is None:
            return
        grid = self.grid(module, *args, **kwargs)
        if grid != scope.grid:  # of as many tokens: nothing else has seen it
            raise RuntimeError(
                _changed(scope.grid, f"{' x '.join(map(str, grid))} tokens under {mask_text(self.clip.given)}")
            )

    def go_last(self, model: nn.Module) -> None:
        """After the hooks that others have registered since, which may change what the model is called with."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is self:
                cast(OrderedDict[int, Any], model._forward_pre_hooks).move_to_end(key)


def _changed(grid: Grid, found: str) -> str:
    return (
        f"swap_in: attention over {found} in a call of a model with {' x '.join(map(str, grid))}: these are not the "
        f"clip's, or a hook that was registered after the swap changed the model's inputs: then swap in again"
    )


def watch_of(model: nn.Module) -> Watch | None:
    """The hook of a swapped model, which holds what its attention shares."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Watch)), None)


@contextmanager
def in_scope(clip: Clip, grid: Grid, whole: int) -> Iterator[None]:
    """A call of a model on this rank's part of a clip, ``grid``, of which the whole has ``whole`` frames."""
    clip.announce(grid, whole)
    token = _scope.set(Scope(clip, grid, {}, _scope.get(), clip.switch.is_dense, whole))
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
    if scope is not None and scope.whole is not None and scope.grid is not None:
        scope.clip.announce(scope.grid, scope.whole)  # the block may be compiled
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
    if not 2 <= mask.ndim <= 4 or mask.shape[1:-1].numel() > mask.shape[1] or (mask.ndim == 3 and mask.shape[1] != 1):
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
    valid, hides = _visible(rows)
    if bool(valid.all()):
        return None
    if hides is not None and not bool(hides.all()):
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
    valid, hides = _visible(rows)
    if hides is not None:
        torch._assert_async(
            hides.all(),
            "swap_in: an attention mask must be 0 or hide keys, where values are not known when it is traced",
        )
    return Keys(valid.sum(-1), _order(valid))


def _visible(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a mask ``(B, n)`` leaves visible, and where biases do no more than to hide the others; None: booleans.

    A sample's keys that all have one finite bias are all visible: softmax drops it.
    """
    if rows.dtype == torch.bool:
        return rows, None
    first = rows[:, :1]
    valid = (rows == 0) | ((rows == first).all(-1, keepdim=True) & torch.isfinite(first))
    return valid, (valid | (rows <= _HIDDEN)) & (valid.any(-1, keepdim=True) | torch.isinf(rows))


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
