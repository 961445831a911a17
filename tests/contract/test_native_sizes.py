"""The compiled module holds every tensor against the others of its call: a wrong one raises, and nobody touches it.

Calls come from vdcore's own functions with checked arguments; here they go past these checks.
"""

import inspect
import re

import pytest
import torch

from vdcore.ops.native import capsule, native
from vdcore.ops.native import missing as why_no_native

pytestmark = pytest.mark.skipif(why_no_native() is not None, reason=str(why_no_native()))

B, T, K, S, H, G, D, L = 3, 4, 5, 6, 4, 2, 8, 7
MASK = [2, 0, 1, 1, 0]


def zeros(*shape):
    return torch.zeros(shape)


def norm_rope(over_all=False, frames=K):
    widths = [n * D if over_all else D for n in (H, G, H, G)]
    norm = (2, over_all, 1e-6, *(torch.ones(n) for n in widths))
    return norm, (1, zeros(frames, S, 1, 3), zeros(frames, S, 1, 3))


def temporal():
    q, k = zeros(B, T, S, H, D), zeros(B, K, S, G, D)
    rest = [[4, 5, 0], MASK, 1, 0.5, *norm_rope(), zeros(H, K, 16), 1]
    return [q, k, k.clone(), q.clone(), zeros(B, T, S, H), *rest]


def temporal_backward():
    q, k = zeros(B, T, S, H, D), zeros(B, K, S, G, D)
    sums = [zeros(6, D) for _ in range(4)]
    return [
        *(*temporal(), q, zeros(B, T, S, H), q.clone(), k, k.clone(), 6, sums),
        *(zeros(1, K, S, 1, 3), zeros(1, K, S, 1, 3), zeros(6, H, K, 16)),
    ]


def packed_temporal():
    _, _, _, out, lse, lengths, mask, _, scale, *_ = temporal()
    return [zeros(B, T, S, 3, H, D), None, None, out, lse, lengths, mask, 0, scale, None, None, None, 1]


def packed_temporal_backward():
    packed = packed_temporal()
    none = [None] * 4
    return [*packed, packed[3].clone(), packed[4].clone(), packed[0].clone(), None, None, 6, none, None, None, None]


def temporal_tangents():
    q, k, v, out, lse, lengths, mask, start, scale, *_ = temporal()
    bias = zeros(H, K, 16)
    given = [q, k, v, out, lse, lengths, mask, start, scale, bias, 1]
    return [*given, q.clone(), k.clone(), k.clone(), bias.clone(), q.clone(), lse.clone()]


def shared_table_backward():
    """A table that positions share has a gradient per item."""
    args = temporal_backward()
    args[10] = (1, zeros(K, 1, 1, 3), zeros(K, 1, 1, 3))
    return [*args[:-3], zeros(6, K, 1, 1, 3), zeros(6, K, 1, 1, 3), args[-1]]


def groups(text=L):
    return native().frame_groups(MASK, B, T, K, S, 1, [4, 5, 0], text, None, True)


def segments(backward):
    q, k, rows = (B, T, S, H, D), (B, K, S, G, D), (B, T, S, H)
    tq, tk, text_rows = (B, 1, L, H, D), (B, 1, L, G, D), (B, 1, L, H)
    shapes = [[q, k, k, q, rows, q], [tq, tk, tk, tq, text_rows, tq]]
    if backward:
        shapes[0] += [q, rows, q, k, k]
        shapes[1] += [tq, text_rows, tq, tk, tk]
    return [[zeros(*shape) for shape in segment] for segment in shapes]


def frames():
    return [groups(), *segments(False), 0.5, None, 1]


def frame_tangents():
    q, k, rows = (B, T, S, H, D), (B, K, S, G, D), (B, T, S, H)
    tq, tk, text_rows = (B, 1, L, H, D), (B, 1, L, G, D), (B, 1, L, H)
    shapes = [[q, k, k, q, rows, q, rows, q, k, k], [tq, tk, tk, tq, text_rows, tq, text_rows, tq, tk, tk]]
    return [groups(), *([zeros(*shape) for shape in segment] for segment in shapes), 0.5, 1]


WINDOWS = (H, [1, 2, 2], True, 1, 0, [[(0, 2)], [(0, 1), (2, 3)], [(1, 5)], []], [(0, 1), (2, 0)], [(0, -1)])


def windows(backward):
    plan = native().windows_plan(B, T, K, 2, 3, 1, [WINDOWS], [4, 5, 0], L, None, True)
    whole = segments(backward)
    return [plan, *([*segment[:5], *segment[6:]] for segment in whole), 0.5]


def tiles():
    return [B, T, 2, 3, [2, 1, 2], B, H, 3, torch.arange(3).int().repeat(B, H, 8, 1), torch.full((B, H, 8), 2).int()]


def gated_frames():
    return [groups(0), segments(False)[0], [], 0.5, zeros(B, 1, S, H, D), 1]


def frames_backward():
    return [groups(), *segments(True), 0.5, 1]


def qk_norm_rope():
    q, k = zeros(B, T, S, H, D), zeros(B, T, S, G, D)
    return [q, k, q.clone(), k.clone(), 1, *norm_rope(True), 1]


def qk_norm_rope_backward():
    q, k = zeros(B, T, S, H, D), zeros(B, T, S, G, D)
    sums = [zeros(6, n * D) for n in (H, G, H, G)]
    table = [zeros(1, K, S, 1, 3) for _ in range(2)]
    return [q, k, q.clone(), k.clone(), q.clone(), k.clone(), 1, *norm_rope(True), 1, 6, sums, *table]


C = 20


def modulate():
    return [zeros(B, T, S, C), zeros(B, 1, 1, C), zeros(B, T, S, C), zeros(C), zeros(C), 2, 1e-6, 1]


def modulate_backward():
    x, sums = zeros(B, T, S, C), zeros(B, T, 2, C)
    return [*modulate(), x, x.clone(), x.clone(), True, True, 2, sums, sums.clone(), sums.clone()]


def gate_residual_backward():
    x = zeros(B, T, S, C)
    return [x, zeros(B, T, S, C), x.clone(), x.clone(), zeros(B, T, S, C), False, 2, zeros(B, 1, 2, C), 1]


E, PATCH, NUMBERS = 9, (2, 1, 3), 5 * 2 * 3


def patches(to_tokens):
    return [
        *(to_tokens, zeros(B, 5, 4, 3, 6), PATCH, False, zeros(B, 2, 6, E), zeros(NUMBERS, E)),
        *(zeros(E if to_tokens else NUMBERS), zeros((E + 64) * (NUMBERS + 64)), 1),
    ]


def patch_weight():
    return [
        *(zeros(B, 5, 4, 3, 6), PATCH, True, zeros(B, 2, 6, E), 3, zeros(3, NUMBERS, E)),
        *(zeros(3, E), zeros(3, NUMBERS), 1),
    ]


CALLS = {
    "temporal_attention_forward": ("temporal_attention_forward", temporal),
    "temporal_attention_backward": ("temporal_attention_backward", temporal_backward),
    "temporal_attention_forward, packed": ("temporal_attention_forward", packed_temporal),
    "temporal_attention_backward, packed": ("temporal_attention_backward", packed_temporal_backward),
    "temporal_attention_tangents": ("temporal_attention_tangents", temporal_tangents),
    "frame_attention_tangents": ("frame_attention_tangents", frame_tangents),
    "temporal_attention_backward, shared table": ("temporal_attention_backward", shared_table_backward),
    "frame_attention_forward": ("frame_attention_forward", frames),
    "frame_attention_forward, gate": ("frame_attention_forward", gated_frames),
    "frame_attention_backward": ("frame_attention_backward", frames_backward),
    "tile_attention_forward": ("tile_attention_forward", lambda: [*windows(False), 1]),
    "tile_attention_tangents": ("tile_attention_tangents", lambda: [*windows(True), 1]),
    "tile_attention_backward": (
        "tile_attention_backward",
        lambda: [*windows(True), zeros(B, H, T * S + L), 1],
    ),
    "lists_plan": ("lists_plan", tiles),
    "qk_norm_rope_forward": ("qk_norm_rope_forward", qk_norm_rope),
    "qk_norm_rope_backward": ("qk_norm_rope_backward", qk_norm_rope_backward),
    "modulate_forward": ("modulate_forward", lambda: [*modulate(), zeros(B, T, S, C)]),
    "modulate_backward": ("modulate_backward", modulate_backward),
    "gate_residual_forward": (
        "gate_residual_forward",
        lambda: [zeros(B, T, S, C), zeros(B, T, S, C), zeros(B, T, 1, C), zeros(B, T, S, C), 1],
    ),
    "gate_residual_backward": ("gate_residual_backward", gate_residual_backward),
    "patch_product, tokens": ("patch_product", lambda: patches(True)),
    "patch_product, patches": ("patch_product", lambda: patches(False)),
    "patch_weight_gradient": ("patch_weight_gradient", patch_weight),
}


def capsules(args):
    if isinstance(args, torch.Tensor):
        return capsule(args)
    return type(args)(map(capsules, args)) if isinstance(args, (list, tuple)) else args


def tensors_of(args, path=()):
    """(path, tensor) of every tensor in nested lists and tuples."""
    if isinstance(args, torch.Tensor):
        yield path, args
    elif isinstance(args, (list, tuple)):
        for i, x in enumerate(args):
            yield from tensors_of(x, (*path, i))


def replaced(args, path, value):
    if not path:
        return value
    return type(args)(replaced(x, path[1:], value) if i == path[0] else x for i, x in enumerate(args))


def wrong_ones(x):
    """The tensor with one entry more or less along an axis, an axis more, other numbers, and strides."""
    for axis, n in enumerate(x.shape):
        yield f"axis {axis} longer", torch.cat([x, x.narrow(axis, 0, 1)], axis)
        if n > 2:
            yield f"axis {axis} shorter", x.narrow(axis, 0, n - 1)
    yield "an axis more", x[None]
    yield "integers", x.long()
    yield "float64", x.double()


def test_every_function_of_the_engine_is_called_here():
    beside = {"cpu_isa", "tile_products", "share_openmp", "frame_runs", "frame_groups", "prompt_groups", "TokenGroups"}
    beside |= {"windows_plan", "TilePlan"}
    functions = {name for name in dir(native()) if not name.startswith("_")} - beside
    assert functions == {function for function, _ in CALLS.values()}


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_is_held_against_the_others(name):
    function, make = CALLS[name]
    run = getattr(native(), function)
    run(*capsules(make()))
    args = make()
    for path, x in tensors_of(args):
        for what, wrong in wrong_ones(x):
            try:
                run(*capsules(replaced(args, path, wrong)))
            except (TypeError, ValueError):
                continue
            pytest.fail(f"{name}: argument {path} {tuple(x.shape)} went through with {what}")


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("temporal", "qk_norm"))])
def test_memory_that_is_read_as_float32(name):
    """Where a kernel takes a row of numbers for float32, or two tables for one dtype, others are refused."""
    function, make = CALLS[name]
    args = make()
    for path, x in tensors_of(args):
        if len(path) > 1 or x.ndim < 5 or x.shape[-1] == 3:  # weights, sums, tables
            with pytest.raises((TypeError, ValueError)):
                getattr(native(), function)(*capsules(replaced(args, path, x.bfloat16())))


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(("frame", "tile", "lists"))])
def test_arguments_by_name(name):
    """In any order; a name that is missing, unknown or given twice is refused, and so is an argument too many."""
    function, make = CALLS[name]
    run, args = getattr(native(), function), capsules(make())
    names = re.findall(r"\w+", run.__text_signature__)
    assert len(names) == len(args) and list(inspect.signature(run).parameters) == names
    named = dict(zip(names, args))
    run(**named)
    run(**dict(reversed(named.items())))
    run(*args[:2], **dict(list(named.items())[2:]))
    for wrong, match in (
        (lambda: run(**{x: y for x, y in named.items() if x != names[1]}), f"{names[1]} is missing"),
        (lambda: run(**named, unheard_of=1), "no argument unheard_of"),
        (lambda: run(*args, **{names[0]: args[0]}), f"{names[0]} is given twice"),
        (lambda: run(*args, None), "too many"),
        (lambda: run(**{**named, "threads": "two"}), f"{function}: threads has a wrong type, str"),
    ):
        with pytest.raises(TypeError, match=match):
            wrong()


def test_lists_and_numbers():
    n = native()
    for lengths in ([1, 2], [1, 2, 3, 4]):
        args = temporal()
        args[5] = lengths
        with pytest.raises(ValueError):
            n.temporal_attention_forward(*capsules(args))
        with pytest.raises(ValueError):
            n.frame_groups(MASK, B, T, K, S, 1, lengths, 0, None, True)
        with pytest.raises(ValueError):
            n.frame_groups(MASK, B, T, K, S, 1, None, L, lengths, True)
        with pytest.raises(ValueError):
            n.prompt_groups(B, T, S, L, False, lengths)
        with pytest.raises(ValueError):
            n.prompt_groups(B, T, S, L, True, lengths)
    for mask in ([0, 0, 0, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0, 0]):
        with pytest.raises(ValueError):
            n.frame_groups(mask, B, T, K, S, 1, None, 0, None, True)
    with pytest.raises(ValueError):
        n.prompt_groups(B, -1, S, L, True, None)
    # Windows whose runs of frames are not sorted or not inside, without a radius, or of other heads; lists likewise.
    bad = ((5, [[(0, 6)]] * T), (5, [[(2, 3), (0, 1)]] * T), (5, [[]]), (6, []), (4, -1), (1, [1, 0, 1]), (0, 0))
    for i, wrong in bad:
        group = tuple(wrong if j == i else x for j, x in enumerate(WINDOWS))
        with pytest.raises(ValueError):
            n.windows_plan(B, T, K, 2, 3, 1, [group], None, 0, None, True)
    for group in ((H + 1, *WINDOWS[1:]), (1, *WINDOWS[1:])):
        made = n.windows_plan(B, T, K, 2, 3, 1, [group], [4, 5, 0], L, None, True)
        with pytest.raises(ValueError):
            n.tile_attention_forward(*capsules([made, *windows(False)[1:], 1]))
    for row in ([0, 8], [-1, 2], [2, 1], [1, 1]):
        args = tiles()
        args[8][1, 2, 3, :2] = torch.tensor(row)
        with pytest.raises(ValueError):
            n.lists_plan(*capsules(args))
    for count in (4, -1):
        args = tiles()
        args[9][1, 2, 3] = count
        with pytest.raises(ValueError):
            n.lists_plan(*capsules(args))
    # Groups of another call: frames, tokens, text, or batch of another size.
    for other in ((B + 1, T, K, S, L), (B, T + 1, K, S, L), (B, T, K - 1, S, L), (B, T, K, S, L - 1)):
        made = n.frame_groups(MASK, *other[:4], 1, None, other[4], None, True)
        with pytest.raises(ValueError):
            n.frame_attention_forward(*capsules([made, *segments(False), 0.5, None, 1]))
