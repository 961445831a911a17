"""The race of windows on a grid: who runs, who does not and why, judged; the peers' masks are the definition."""

import pytest
import torch

from vdcore import FrameMask, GridMask
from vdcore.integrations.mask_names import parse_mask
from vdcore_bench.jobs import make
from vdcore_bench.measure.journal import FILE, GRID_MASKS, Journal, Watch, parse
from vdcore_bench.peers import PEERS, fastvideo, natten
from vdcore_bench.peers.adapter import dense_mask, window_tables
from vdcore_bench.report import results
from vdcore_bench.suites import grid_masks
from vdcore_bench.workloads import Shape, load

GRID = (3, 4, 6)
NAMES = ("dense", "tiles:3/1/3:1/2/2", "neighborhood:3/3/3", "radial", "frames:1/0")


def job(mask, grid=GRID, **given):
    T, rows, columns = grid
    shape = Shape(B=1, T=T, rows=rows, columns=columns, H=2, G=2, D=16)
    in_frames = isinstance(mask, FrameMask)
    masks = {"mask": mask if in_frames else FrameMask(), "grid_mask": None if in_frames else mask}
    return make("video_attention", load()["ltx-2b-704p"], shape=shape, **masks, **given)


def sweep(path, monkeypatch, theirs):
    monkeypatch.setattr(grid_masks, "THEIRS", theirs)
    journal = Journal(path / FILE)
    given = {"grid": GRID, "masks": NAMES, "workloads": ("ltx-2b-704p",), "rounds": 3}
    grid_masks.sweep(journal, Watch(), "cpu", [torch.float32], **given)
    journal.close()
    return parse((path / FILE).read_text())


def test_every_mask_by_everybody(tmp_path, monkeypatch):
    rows = sweep(tmp_path, monkeypatch, [name for name in grid_masks.THEIRS if name != "flex"])
    ran = {(row.case.removeprefix(GRID_MASKS), row.provider) for row in rows if row.status == "ok"}
    assert ran == {(name, who) for name in NAMES for who in ("vdcore", "sdpa[flash]")}
    assert all(row.error_ratio <= 1 and row.samples == 3 for row in rows if row.status == "ok")
    left = {row.provider: row.reason for row in rows if row.status == "skipped"}
    assert set(left) == {"sdpa[efficient]", "natten", "sta", "vsa"} and all(left.values())
    (table,) = results.grid_mask_tables(rows)
    assert len(table.rows) == 2 * len(NAMES)
    shares = {line[0].partition(" (")[0]: line[1] for line in table.rows}
    assert shares["dense"] == "100.0%" and shares["frames:1/0"] == f"{5 / 9:.1%}"
    assert shares["neighborhood:3/3/3"] == f"{27 / 72:.1%}"
    assert results.pictures.draw(rows)["masks"][1].startswith(b"\x89PNG")
    assert table.title in results.report(rows, {})


@pytest.mark.slow
def test_flex_attention_has_the_same_windows(tmp_path, monkeypatch):
    rows = sweep(tmp_path, monkeypatch, ["flex"])
    flex = [row for row in rows if row.provider == "flex"]
    assert len(flex) == len(NAMES) and all(row.status == "ok" and row.error_ratio <= 1 for row in flex), rows


@pytest.mark.parametrize(
    "mask",
    [
        GridMask.tiles((1, 3, 3), (2, 2, 2)),
        GridMask.neighborhood((3, 3, 3)),
        GridMask.radial(4, 6),
        GridMask(FrameMask(1, 0, 1, 1), rows=(2, 0), columns=(1, 0), sink=1),
    ],
    ids=str,
)
def test_small_tables_are_the_definition(mask):
    """What FlexAttention looks up, put together for all pairs."""
    frames, rows, columns = window_tables(job(mask))
    near = rows[:, :, None, :, :, None] & columns[:, None, :, :, None, :]
    seen = frames[:, None, None, :, None, None] & near
    n = GRID[0] * GRID[1] * GRID[2]
    assert torch.equal(seen.reshape(n, n), mask.visible(*GRID))
    assert torch.equal(dense_mask(job(mask)), mask.visible(*GRID))


def test_windows_in_the_terms_of_others():
    assert natten._kernel(job(GridMask.neighborhood((3, 3, 5)))) == (3, 3, 5)
    for mask in (GridMask.neighborhood((5, 3, 5)), GridMask.window(1, 1, 1, 1), GridMask.tiles((3, 3, 3), (1, 2, 2))):
        assert natten._kernel(job(mask)) is None
    grid = (18, 48, 80)
    assert fastvideo._window(job(GridMask.tiles((3, 3, 5), (6, 8, 8)), grid)) == (3, 3, 5)
    assert fastvideo._window(job(FrameMask.full(), grid)) == (3, 6, 10)
    for mask in (GridMask.tiles((3, 3, 3), (4, 8, 8)), GridMask.radial(48, 80), FrameMask.causal()):
        assert fastvideo._window(job(mask, grid)) is None


def test_tiles_are_put_back_where_they_were(monkeypatch):
    """With attention that returns the values: the layout alone, on a stand-in of the library."""
    import sys
    from types import SimpleNamespace

    seen = {}

    def attention(q, k, v, window, text, has_text, shape):
        seen.update(v=v, window=window, shape=shape)
        return v

    monkeypatch.setitem(sys.modules, "fastvideo_kernel", SimpleNamespace(sliding_tile_attention=attention))
    grid = (6, 16, 24)
    one = job(GridMask.tiles((1, 1, 3), (6, 8, 8)), grid)
    (make_it,) = fastvideo.sliding_tiles(one).values()
    q, k, v = torch.randn(3, 1, 6, 16 * 24, 2, 16)
    assert torch.equal(make_it()(q, k, v), v)
    assert seen["window"] == [(1, 1, 3)] * 2 and seen["shape"] == "6x16x24"
    first = v.view(1, 6, 16, 24, 2, 16)[0, :, :8, :8, 0]
    assert torch.equal(seen["v"][0, 0, :384], first.reshape(384, 16))


def test_names_are_masks_on_the_default_grids():
    for kind, names in grid_masks.MASKS.items():
        for name in names:
            parse_mask(name, grid_masks.GRID[kind])
    assert {peer.name for peer in PEERS} >= set(grid_masks.THEIRS)
