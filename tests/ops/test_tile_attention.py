"""Lists of tiles: how they are chosen, and how much of the softmax a mask keeps."""

import itertools

import pytest
import torch

import vdcore
from vdcore import FrameMask, GridMask, TileLists

GRID, T = (3, 5), 4
TILES = [(1, 1, 1), (2, 2, 3), (3, 3, 2), (9, 9, 9)]


def boxes(tile):
    """Tokens of every tile, by coordinates."""
    found = {}
    for i, place in enumerate(itertools.product(range(T), range(GRID[0]), range(GRID[1]))):
        found.setdefault(tuple(x // t for x, t in zip(place, tile)), []).append(i)
    return [found[key] for key in sorted(found)]


def draw(H=2, G=2, dtype=torch.float32):
    heads = {"q": H, "k": G, "v": G}
    return [torch.randn(2, T, GRID[0] * GRID[1], n, 16, dtype=dtype) for n in heads.values()]


def kept(lists, b, h):
    return [set(row[:n].tolist()) for row, n in zip(lists.indices[b, h], lists.counts[b, h])]


@pytest.mark.parametrize("keep", [1, 3, 1000, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("tile", TILES)
def test_select_tiles(tile, keep):
    q, k, _ = draw(H=4, G=2)
    lists = vdcore.select_tiles(q, k, tile=tile, grid=GRID, keep=keep, scale=2.0)
    tokens = boxes(tile)
    n = len(tokens)
    assert lists.indices.shape[:3] == lists.counts.shape == (2, 4, n)
    for b, h in itertools.product(range(2), range(4)):
        means = [
            torch.stack([x.flatten(1, 2)[b, some, i].double().mean(0) for some in tokens])
            for x, i in ((q, h), (k, h // 2))
        ]
        share = (2.0 * means[0] @ means[1].T).softmax(-1)
        for i, mine in enumerate(kept(lists, b, h)):
            others = sorted((j for j in range(n) if j != i), key=lambda j: -share[i, j])
            expected = [i, *others]
            if isinstance(keep, int) or keep == 1:
                expected = expected[: keep if isinstance(keep, int) else n]
            else:
                while len(expected) > 1 and sum(share[i, j] for j in expected[:-1]) >= keep:
                    expected.pop()
            assert mine == set(expected)
    valid = torch.arange(lists.indices.shape[3]) < lists.counts[..., None]
    assert not (valid[..., 1:] & (lists.indices.diff() <= 0)).any()


def test_ties_go_to_the_lower_index():
    q = torch.zeros(1, T, 15, 1, 8)
    lists = vdcore.select_tiles(q, q, tile=(1, 3, 5), grid=GRID, keep=2)
    assert lists.indices[0, 0].tolist() == [[0, 1], [0, 1], [0, 2], [0, 3]]


def test_lists_need_no_gradient_and_half_precision_is_summed_in_float32():
    q, k, v = (x.requires_grad_() for x in draw(dtype=torch.bfloat16))
    lists = vdcore.select_tiles(q, k, tile=(2, 2, 2), grid=GRID, keep=3)
    wide = vdcore.select_tiles(q.detach().float(), k.detach().float(), tile=(2, 2, 2), grid=GRID, keep=3)
    assert torch.equal(lists.indices, wide.indices)
    vdcore.tile_attention(q, k, v, lists, tile=(2, 2, 2), grid=GRID).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v))


def test_lists_are_the_same_under_autocast():
    """Scores stay in float32, and a query and a key of two dtypes are taken as attention takes them."""
    q, k, _ = draw(dtype=torch.bfloat16)
    given = {"tile": (1, 1, 2), "grid": GRID, "keep": 0.5}
    plain = vdcore.select_tiles(q, k, **given)
    for theirs in (k, k.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = vdcore.select_tiles(q, theirs, **given)
        assert torch.equal(cast.counts, plain.counts) and torch.equal(cast.indices, plain.indices)
    assert vdcore.select_tiles(q.to("meta"), k.to("meta"), **given | {"keep": 2}).indices.shape == (2, 2, 36, 2)


@pytest.mark.parametrize(
    "keep,error,message",
    [
        (0, ValueError, "at least 1"),
        (0.0, ValueError, "share in"),
        (1.5, ValueError, "share in"),
        ("all", TypeError, "int or a float"),
    ],
)
def test_wrong_keep(keep, error, message):
    q, k, _ = draw()
    with pytest.raises(error, match=f"select_tiles: keep must be .*{message}"):
        vdcore.select_tiles(q, k, tile=(1, 1, 1), grid=GRID, keep=keep)


def test_a_list_of_all_is_dense_attention_and_its_own_tile_a_window():
    q, k, v = draw()
    everything = vdcore.select_tiles(q, k, tile=(2, 2, 3), grid=GRID, keep=1.0)
    out = vdcore.tile_attention(q, k, v, everything, tile=(2, 2, 3), grid=GRID)
    torch.testing.assert_close(out, vdcore.video_attention(q, k, v))
    own = vdcore.select_tiles(q, k, tile=(2, 2, 3), grid=GRID, keep=1)
    out = vdcore.tile_attention(q, k, v, own, tile=(2, 2, 3), grid=GRID)
    mask = GridMask.tiles((1, 1, 1), (2, 2, 3))
    torch.testing.assert_close(out, vdcore.video_attention(q, k, v, mask=mask, grid=GRID))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("size", [2**31, 2**32, 2**62])
def test_a_tile_of_any_size_is_cut_off_at_the_border(axis, size):
    q, k, v = draw()
    sizes = (T, *GRID)
    most, huge = ([n if i == axis else 1 for i in range(3)] for n in (sizes[axis], size))
    lists = vdcore.select_tiles(q, k, tile=huge, grid=GRID, keep=2)
    same = vdcore.select_tiles(q, k, tile=most, grid=GRID, keep=2)
    assert torch.equal(lists.indices, same.indices)
    found = vdcore.tile_attention(q, k, v, lists, tile=huge, grid=GRID)
    assert torch.equal(found, vdcore.tile_attention(q, k, v, same, tile=most, grid=GRID))


def test_wrong_lists():
    indices, counts = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    for given, error, message in (
        ((indices.long(), counts), TypeError, "indices must be int32, got torch.int64"),
        ((indices[0], counts), ValueError, r"indices must be \(B or 1, H or 1, n, K\), got \(1, 4, 2\)"),
        ((indices, counts[..., :3]), ValueError, r"counts must be \(1, 1, 4\)"),
        ((indices, None), TypeError, "counts must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"TileLists: {message}"):
            TileLists(*given)


# ---- How much a mask keeps ----


def share_of(q, k, seen):
    """Of the softmax of every query, in float64: q and k ``(B, T, S, H, D)``, seen ``(n, n)``."""
    q, k = (x.flatten(1, 2).transpose(1, 2).double() for x in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mul(seen).sum(-1).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_mass(dtype):
    q, k, _ = draw(dtype=dtype)
    masks = {
        FrameMask.causal(): FrameMask.causal().visible(T).repeat_interleave(15, 0).repeat_interleave(15, 1),
        GridMask.neighborhood((3, 3, 3)): GridMask.neighborhood((3, 3, 3)).visible(T, *GRID),
        ((1, GridMask.radial(*GRID)), (1, GridMask(rows=0))): torch.stack(
            [GridMask.radial(*GRID).visible(T, *GRID), GridMask(rows=0).visible(T, *GRID)]
        ),
    }
    for mask, seen in masks.items():
        found = vdcore.kept_mass(q, k, mask, grid=GRID)
        assert found.dtype == torch.float32 and found.shape == q.shape[:-1] and found.max() <= 1
        torch.testing.assert_close(found.flatten(1, 2).double(), share_of(q, k, seen), rtol=1e-4, atol=1e-5)
    assert vdcore.kept_mass(q, k, FrameMask()).eq(1).all()


def test_kept_mass_of_lists():
    q, k, _ = draw()
    tile = (2, 2, 3)
    lists = vdcore.select_tiles(q, k, tile=tile, grid=GRID, keep=2)
    lists = TileLists(lists.indices[:1, :1], lists.counts[:1, :1].clone())
    lists.counts[0, 0, 1] = 0
    seen = torch.zeros(60, 60, dtype=torch.bool)
    tokens = boxes(tile)
    for mine, theirs in zip(tokens, kept(lists, 0, 0)):
        for j in theirs:
            seen[torch.tensor(mine)[:, None], torch.tensor(tokens[j])] = True
    found = vdcore.kept_mass(q, k, lists, grid=GRID, tile=tile)
    torch.testing.assert_close(found.flatten(1, 2).double(), share_of(q, k, seen), rtol=1e-5, atol=1e-6)
    assert found.flatten(1, 2)[:, tokens[1]].eq(0).all()
    with pytest.raises(ValueError, match=r"kept_mass: tile must be .* with TileLists"):
        vdcore.kept_mass(q, k, lists, grid=GRID)
    with pytest.raises(ValueError, match="kept_mass: tile must be None without TileLists"):
        vdcore.kept_mass(q, k, FrameMask(), tile=tile)


def test_wrong_kept_mass():
    """Errors are in its own name, not in that of the attention that it calls."""
    q, k, _ = draw()
    tile, near = (2, 2, 3), GridMask(rows=1)
    lists = vdcore.select_tiles(q, k, tile=tile, grid=GRID, keep=2)
    two = TileLists(lists.indices[..., :2, :], lists.counts[..., :2])
    past, double = GridMask(FrameMask.teacher_forcing(1), rows=1), k.double()
    for error, args, given, message in (
        (ValueError, (q, k, near), {}, r"grid must be .* with a GridMask, got None"),
        (ValueError, (q, k, near), {"grid": (3, 4)}, r"grid must be .* S = 15, got \(3, 4\)"),
        (TypeError, (q, k, None), {}, "mask must be a FrameMask, a GridMask or .*, got NoneType"),
        (ValueError, (q, k, ((3, near),)), {"grid": GRID}, "mask must be of H = 2 query heads in all, got 3"),
        (ValueError, (q, k, past), {"grid": GRID}, "mask must be one of teacher forcing .* got q_start"),
        (TypeError, (q, double, near), {"grid": GRID}, "k must be torch.float32, as q, got torch.float64"),
        (ValueError, (q, k, lists), {"tile": tile}, r"grid must be \(rows, columns\) .*, got None"),
        (
            ValueError,
            (q[:, 1:], k, lists),
            {"tile": tile, "grid": GRID},
            r"k must be .* with TileLists = .*, got \(2, 4",
        ),
        (
            ValueError,
            (q, k, two),
            {"tile": tile, "grid": GRID},
            r"tiles.counts must be .* n = 8 tiles, got \(2, 2, 2\)",
        ),
        (TypeError, (q, k, near), {"grid": GRID, "scale": "1"}, "scale must be a number, got str"),
    ):
        with pytest.raises(error, match=f"kept_mass: {message}"):
            vdcore.kept_mass(*args, **given)


def test_kept_mass_of_a_row_that_sees_nan():
    q, k = torch.randn(2, 1, 3, 6, 2, 16)
    k[0, 1, 2] = torch.nan
    mask = GridMask.window(0, 0, 1, 1)
    sees = mask.visible(3, 2, 3)[:, 6 + 2].view(3, 6)
    kept = vdcore.kept_mass(q, k, mask, grid=(2, 3))
    assert kept[0, sees].isnan().all()
