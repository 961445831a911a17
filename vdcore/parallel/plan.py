"""How attention across frames is shared out: what each way would send, and which is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdcore.mask import FrameMask
from vdcore.ops.check import wrong
from vdcore.parallel.halo import frames_in, halo_of
from vdcore.parallel.peers import Peers, part_sizes
from vdcore.parallel.ring import Ring

Messages = Callable[[int, int], int]  # elements from one rank to another


@dataclass(frozen=True)
class Plan:
    """One way of sharing out an attention layer.

    Args:
        name: ``"heads"``, ``"ring"``, ``"halo"`` or ``"switch"``.
        sent: bytes that each rank sends, forward.
        reason: why it is not taken by itself; None: it may be.
        everything: some rank holds the keys and values of all frames at once.
    """

    name: str
    sent: tuple[int, ...]
    reason: str | None = None
    everything: bool = False

    @property
    def most(self) -> int:
        return max(self.sent)

    def __str__(self) -> str:
        return f"{self.name}: {self.most / 1e6:.1f} MB per rank at most" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Layer:
    """An attention layer's sizes.

    Args:
        batch, frames, tokens, heads, kv_heads, channels: B, T, S, H, G, D of the whole.
        itemsize: bytes of an element.
        mask: which frames a frame sees.
    """

    batch: int
    frames: int
    tokens: int
    heads: int
    kv_heads: int
    channels: int
    itemsize: int = 2
    mask: FrameMask = FrameMask()

    @property
    def row(self) -> int:
        """Bytes of one head of a frame."""
        return self.batch * self.tokens * self.channels * self.itemsize


def _sent(ranks: int, messages: Messages) -> tuple[int, ...]:
    return tuple(sum(messages(i, j) for j in range(ranks) if j != i) for i in range(ranks))


def heads_plan(layer: Layer, ranks: int) -> Plan:
    """Queries, keys and values from frame shards to head shards, the result back (Jacobs et al. 2023, Ulysses)."""
    frames, groups = part_sizes(layer.frames, ranks), part_sizes(layer.kv_heads, ranks)
    each = layer.heads // layer.kv_heads  # query heads of a key head

    def messages(i: int, j: int) -> int:
        return layer.row * (frames[i] * groups[j] * (each + 2) + frames[j] * groups[i] * each)

    uneven = None if layer.kv_heads % ranks == 0 else f"{ranks} ranks do not divide {layer.kv_heads} heads"
    return Plan("heads", _sent(ranks, messages), uneven)


def ring_plan(layer: Layer, ranks: int) -> Plan:
    """Shards of keys and values pass from rank to rank, as far as the mask shows them."""
    sizes, ring = part_sizes(layer.frames, ranks), Ring(Peers("", 0, ranks), layer.frames, layer.mask, None, None)
    sent = [0] * ranks
    for shard in range(ranks):
        for step in range(ring.reach(shard)):
            sent[(shard + step) % ranks] += 2 * layer.row * layer.kv_heads * sizes[shard]
    return Plan("ring", tuple(sent))


def halo_plan(layer: Layer, ranks: int) -> Plan:
    """Each rank sends the frames of keys and values that others see; a rank holds all that it sees."""
    halo = halo_of(layer.mask, layer.frames, Peers("", 0, ranks))
    frame = 2 * layer.row * layer.kv_heads
    sent = _sent(ranks, lambda i, j: frame * frames_in(halo.message(i, j)))
    return Plan("halo", sent, everything=max(map(frames_in, halo.seen)) == layer.frames)


def switch_plan(layer: Layer, ranks: int) -> Plan:
    """The tokens of a factorized model from frame shards to token shards before temporal attention, and back."""
    frames, tokens = part_sizes(layer.frames, ranks), part_sizes(layer.tokens, ranks)
    token = layer.batch * layer.heads * layer.channels * layer.itemsize
    return Plan("switch", _sent(ranks, lambda i, j: token * (frames[i] * tokens[j] + tokens[i] * frames[j])))


Way = Callable[[Layer, int], Plan]

# Where two send the same, the fewer messages; but a ring before a halo of all frames: its memory falls with N.
VIDEO: dict[str, Way] = {"heads": heads_plan, "halo": halo_plan, "ring": ring_plan}
TEMPORAL: dict[str, Way] = {"switch": switch_plan, "halo": halo_plan}


def plans(layer: Layer, ranks: int, ways: dict[str, Way]) -> list[Plan]:
    """All ways, the one that is taken first: of those that may be, the one whose busiest rank sends least."""
    return sorted(
        (way(layer, ranks) for way in ways.values()), key=lambda p: (p.reason is not None, p.most, p.everything)
    )


def explain(
    shape: Sequence[int],
    ranks: int,
    *,
    mask: FrameMask = FrameMask(),
    kv_heads: int | None = None,
    itemsize: int = 2,
    op: str = "video_attention",
) -> list[Plan]:
    """What each way of sharing out an attention layer would send, the one that is taken first.

    Args:
        shape: ``(B, T, S, H, D)`` of the whole.
        ranks: N.
        mask: which frames a frame sees.
        kv_heads: G; None: H.
        itemsize: bytes of an element, 2 in bfloat16.
        op: ``"video_attention"``, or ``"temporal_attention"`` for the temporal layer of a factorized model.

    Raises:
        ValueError: another shape, number of ranks or operator.
    """
    if len(shape) != 5:
        wrong("explain", "shape", "(B, T, S, H, D)", tuple(shape))
    if ranks < 1:
        wrong("explain", "ranks", "at least 1", ranks)
    ways = {"video_attention": VIDEO, "temporal_attention": TEMPORAL}
    if op not in ways:
        wrong("explain", "op", " or ".join(map(repr, ways)), repr(op))
    B, T, S, H, D = shape
    return plans(Layer(B, T, S, H, kv_heads or H, D, itemsize, mask), ranks, ways[op])


def choose(op: str, plan: str | None, layer: Layer, ranks: int, ways: dict[str, Way]) -> str:
    """The plan that is forced, or the one that sends least."""
    if plan is None:
        return plans(layer, ranks, ways)[0].name
    if plan not in ways:
        wrong(op, "plan", f"one of {', '.join(ways)}, or None", repr(plan))
    return plan
