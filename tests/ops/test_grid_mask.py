"""GridMask against the definitions of others, written down here for themselves, and what it counts and says."""

import itertools
import math

import pytest
import torch

import vdcore
from vdcore import FrameMask, GridMask
from vdcore.grid_mask import HeadMasks
from vdcore.ops.call import CODECS

SIZES = [(3, 5, 7), (5, 3, 4), (1, 6, 9), (7, 2, 1)]
MASKS = [
    GridMask(),
    GridMask.window(2, 0, 1, (2, 1, 0)),
    GridMask.neighborhood((3, 3, 5)),
    GridMask.neighborhood((5, 1, 3), causal=True),
    GridMask.tiles((3, 1, 3), (2, 2, 3)),
    GridMask.radial(5, 7),
    GridMask(FrameMask(past=1, future=1, chunk=2, sink=1), (2, 0), None, (2, 2, 3), "shift", sink=1),
    GridMask(FrameMask(past=1, future=1, chunk=3), 1, 1, (3, 1, 2), "clip", "shift", 2),
    GridMask(FrameMask.teacher_forcing(9, chunk=2), (2, 1, 0), (1, 0)),
    GridMask(FrameMask(past=1, future=0, shots=(0, 2)), 1),
]


def natten(index, other, size, kernel, causal):
    """NATTEN's get_window_start and get_window_end for one axis, dilation and stride 1."""
    if causal:
        return max(index - kernel + 1, 0) <= other <= index
    if kernel >= size:
        return True
    start = max(index - kernel // 2, 0)
    if index + kernel // 2 >= size:
        start += size - index - kernel // 2 - 1
    return start <= other < start + kernel


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 5), (1, 5, 3), (5, 7, 7), (3, 1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_neighborhood_is_what_natten_says(sizes, kernel, causal):
    T, rows, columns = sizes
    seen = GridMask.neighborhood(kernel, causal).visible(*sizes)
    axes = [
        torch.tensor([[natten(i, j, n, k, causal and axis == 0) for j in range(n)] for i in range(n)])
        for axis, (n, k) in enumerate(zip(sizes, kernel))
    ]
    expected = axes[0][:, None, None, :, None, None] & axes[1][None, :, None, None, :, None]
    expected = expected & axes[2][None, None, :, None, None, :]
    assert torch.equal(seen, expected.reshape(seen.shape))


@pytest.mark.parametrize("window,tile", [((3, 3, 1), (2, 2, 3)), ((1, 3, 3), (1, 2, 2)), ((3, 1, 5), (3, 4, 1))])
@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_are_what_sliding_tile_attention_says(sizes, window, tile):
    """Its mask: |clamp(query tile, window // 2, tiles - 1 - window // 2) - key tile| <= window // 2 on every axis."""
    seen = GridMask.tiles(window, tile).visible(*sizes)
    canvas = [-(-n // t) for n, t in zip(sizes, tile)]
    tokens = list(itertools.product(*map(range, sizes)))
    expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for (i, query), (j, key) in itertools.product(enumerate(tokens), repeat=2):
        near = True
        for axis in range(3):
            half, last = window[axis] // 2, canvas[axis] - 1
            center = max(min(query[axis] // tile[axis], last - half), half) if window[axis] < canvas[axis] else None
            near &= center is None or abs(center - key[axis] // tile[axis]) <= half
        expected[i, j] = near
    assert torch.equal(seen, expected)


def test_radial_is_its_formula():
    T, rows, columns = 12, 6, 5
    seen = GridMask.radial(rows, columns, sink=2).visible(T, rows, columns).view(T, rows, columns, T, rows, columns)
    for f, g in itertools.product(range(T), repeat=2):
        d = abs(f - g)
        if d <= 1 or g < 2:
            assert seen[f, :, :, g].all()
            continue
        k = math.ceil(math.log2(d))
        r, c = math.ceil(rows / 2 ** math.ceil(k / 2)), math.ceil(columns / 2 ** (k // 2))
        for (y, x), (v, u) in itertools.product(itertools.product(range(rows), range(columns)), repeat=2):
            assert seen[f, y, x, g, v, u] == (abs(y - v) <= r and abs(x - u) <= c)


def test_teacher_forcing_measures_distances_within_a_half():
    rows, columns, T = 2, 5, 4
    mask = GridMask(FrameMask.teacher_forcing(T), columns=(2, 1, 0))
    seen = mask.visible(2 * T, rows, columns).view(2 * T, rows, columns, 2 * T, rows, columns)
    frames = FrameMask.teacher_forcing(T).visible(2 * T)
    for f, g in itertools.product(range(2 * T), repeat=2):
        r = (2, 1, 0, 0)[abs(f % T - g % T)]
        near = (torch.arange(columns)[:, None] - torch.arange(columns)).abs() <= r
        expected = (near & frames[f, g])[None, :, None, :].expand(rows, -1, rows, -1)
        assert torch.equal(seen[f, :, :, g], expected)


def test_radial_grows_as_n_log_n():
    """Per token and doubling of the frames about one constant is added to what it sees."""
    rows, columns = 22, 40
    seen = [GridMask.radial(rows, columns).density(T, rows, columns) * T * rows * columns for T in (16, 32, 64, 128)]
    added = [b - a for a, b in itertools.pairwise(seen)]
    assert max(added) < 1.5 * min(added) and seen[-1] < 0.2 * 128 * rows * columns


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("T_k,q_start", [(None, 0), (7, 2), (2, 0), (3, 6), (0, 0)])
def test_counts_and_runs_are_those_of_the_definition(mask, T_k, q_start):
    for T, rows, columns in SIZES:
        keys = q_start + T if T_k is None else T_k
        seen = mask.visible(T, rows, columns, T_k, q_start)
        assert seen.shape == (T * rows * columns, keys * rows * columns)
        frames = seen.view(T, rows * columns, keys, rows * columns)
        assert torch.equal(mask.pairs(T, rows, columns, T_k, q_start), frames.sum((1, 3)))
        assert mask.density(T, rows, columns, T_k, q_start) == pytest.approx(float(seen.float().mean()) if keys else 0)
        for t, runs in enumerate(mask.frame_runs(T, T_k, q_start)):
            shown = [any(a <= g < b for a, b in runs) for g in range(keys)]
            assert shown == frames[t].any(0).any(-1).tolist()


@pytest.mark.parametrize("frames", [FrameMask.causal(), FrameMask(past=1, future=0, chunk=2, sink=1)], ids=str)
def test_without_windows_it_is_the_frame_mask(frames):
    mask = GridMask(frames)
    seen = mask.visible(5, 2, 3)
    assert torch.equal(seen, frames.visible(5).repeat_interleave(6, 0).repeat_interleave(6, 1))
    assert mask.density(5, 2, 3) == pytest.approx(frames.density(5))
    q, k, v = torch.randn(3, 1, 5, 6, 2, 8)
    assert torch.equal(
        vdcore.video_attention(q, k, v, mask=mask, grid=(2, 3)), vdcore.video_attention(q, k, v, mask=frames)
    )


def test_it_costs_what_the_frame_mask_does():
    """It is that before a backend is asked."""
    q = torch.randn(1, 5, 6, 2, 8)
    rows = vdcore.explain("video_attention", q, q, q, mask=GridMask(FrameMask.causal()), grid=(2, 3))
    assert rows == vdcore.explain("video_attention", q, q, q, mask=FrameMask.causal())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_it_crosses_the_boundary_of_an_operator(mask):
    codec = CODECS[FrameMask | HeadMasks]
    masks = HeadMasks((5, 7), ((2, mask), (1, GridMask(FrameMask.causal()))))
    back = codec.build(*codec.describe(masks))
    assert back.grid == masks.grid and [heads for heads, _ in back.groups] == [2, 1]
    for (_, one), (_, other) in zip(back.groups, masks.groups):
        assert torch.equal(one.visible(9, 5, 7), other.visible(9, 5, 7))
    assert codec.build(*codec.describe(FrameMask.window(2))) == FrameMask.window(2)


def test_two_grids_of_one_length():
    """Nothing is kept by length: hazard 26."""
    q, k, v = torch.randn(3, 1, 3, 24, 1, 8)
    mask = GridMask.neighborhood((3, 3, 3))
    for _ in range(2):
        for grid in ((4, 6), (6, 4)):
            out = vdcore.video_attention(q, k, v, mask=mask, grid=grid)
            heads_first = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
            expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask.visible(3, *grid))
            torch.testing.assert_close(out.flatten(1, 2), expected.transpose(1, 2))


WRONG = [
    (TypeError, {"frames": "causal"}, "frames must be a FrameMask, got str"),
    (ValueError, {"rows": -1}, "rows must be at least 0, got -1"),
    (TypeError, {"columns": 1.5}, "columns must be an int, got 1.5"),
    (ValueError, {"columns": ()}, r"columns must be a radius, .* got \(\)"),
    (ValueError, {"rows": (2, -3)}, "rows must be at least 0, got -3"),
    (TypeError, {"tile": (1, 2)}, r"tile must be a tuple of three ints, got \(1, 2\)"),
    (ValueError, {"tile": (1, 0, 2)}, "tile must be at least 1, got 0"),
    (ValueError, {"border": "wrap"}, "border must be 'clip' or 'shift', got 'wrap'"),
    (
        ValueError,
        {"frame_border": "shift"},
        "frame_border='shift' must come with frames whose past and",
    ),
    (ValueError, {"frame_border": "shift", "frames": FrameMask(1, 1, sink=1)}, ".* and without a sink"),
    (ValueError, {"sink": -1}, "sink must be at least 0, got -1"),
]


@pytest.mark.parametrize("error,arguments,message", WRONG, ids=str)
def test_wrong_masks(error, arguments, message):
    with pytest.raises(error, match=f"GridMask: {message}"):
        GridMask(**arguments)


WRONG_SIZES = [
    (ValueError, lambda: GridMask(rows=1).density(-1, 2, 3), "GridMask: T must be at least 0, got -1"),
    (TypeError, lambda: GridMask(rows=1).visible(2, 3.0, 4), "GridMask: rows must be an int, got 3.0"),
    (TypeError, lambda: GridMask(rows=1).pairs(2, 3, 4, "5"), "GridMask: T_k must be an int, got '5'"),
    (ValueError, lambda: GridMask.neighborhood((3, 3, 3)).frame_runs(-1), "GridMask: T must be at least 0, got -1"),
    (TypeError, lambda: FrameMask().density(2.5), "FrameMask: T must be an int, got 2.5"),
    (ValueError, lambda: FrameMask().runs(3, q_start=-2), "FrameMask: q_start must be at least 0, got -2"),
]


@pytest.mark.parametrize("error,ask,message", WRONG_SIZES, ids=[message for _, _, message in WRONG_SIZES])
def test_wrong_sizes(error, ask, message):
    with pytest.raises(error, match=message):
        ask()


def test_huge_numbers():
    """They mean all there is, to the definition and to the engine."""
    huge = 10**30
    q, k, v = torch.randn(3, 1, 3, 12, 1, 8)
    dense = vdcore.video_attention(q, k, v)
    for mask in (
        GridMask(rows=huge, columns=(huge,), sink=huge),
        GridMask(rows=0, columns=0, tile=(huge, huge, huge)),
        GridMask(FrameMask(huge, huge, chunk=huge), rows=huge, columns=huge),
    ):
        assert mask.visible(3, 3, 4).all() and mask.density(3, 3, 4) == 1
        torch.testing.assert_close(vdcore.video_attention(q, k, v, mask=mask, grid=(3, 4)), dense)
    assert FrameMask(huge, huge, shots=(0, huge)).visible(4).all()
    assert FrameMask.teacher_forcing(huge, huge, huge).visible(4).all()


def test_wrong_windows():
    with pytest.raises(ValueError, match=r"neighborhood: kernel_size must be odd .* got \(3, 4, 3\)"):
        GridMask.neighborhood((3, 4, 3))
    with pytest.raises(ValueError, match="neighborhood: causal must be a bool"):
        GridMask.neighborhood((3, 3, 3), causal=(True, True, False))
    assert GridMask.neighborhood((3, 3, 3), (True, False, False)) == GridMask.neighborhood((3, 3, 3), True)
    with pytest.raises(ValueError, match="tiles: window must be odd"):
        GridMask.tiles((2, 3, 3), (1, 1, 1))
    for causal in (None, 1):
        with pytest.raises(ValueError, match=f"neighborhood: causal must be a bool, .* got {causal}"):
            GridMask.neighborhood((3, 3, 3), causal=causal)
    for given, message in (
        (lambda: GridMask.neighborhood(3), "neighborhood: kernel_size must be a tuple of three ints, got 3"),
        (lambda: GridMask.tiles(3, (1, 2, 2)), "tiles: window must be a tuple of three ints, got 3"),
        (lambda: GridMask.tiles((3, 3, 3), 2), "tiles: tile must be a tuple of three ints, got 2"),
    ):
        with pytest.raises(TypeError, match=message):
            given()
    with pytest.raises(ValueError, match=r"radial: .* must be at least 1, got 0"):
        GridMask.radial(0, 3)


def test_windows_are_made_inside_of_what_is_compiled():
    def attend(q):
        masks = GridMask.radial(3, 4, frames=8), GridMask.neighborhood((3, 3, 3)), GridMask.tiles((1, 3, 1), (2, 1, 2))
        return [vdcore.video_attention(q, q, q, mask=mask, grid=(3, 4)) for mask in masks]

    q = torch.randn(1, 5, 12, 2, 8)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)(q)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(compiled, attend(q)))


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for mask, T_k, q_start in ((MASKS[5], None, 0), (MASKS[3], 9, 4)):
        path = tmp_path / f"{q_start}.png"
        mask.show(path, 5, 6, 7, T_k, q_start)
        assert path.read_bytes()[:4] == b"\x89PNG"
