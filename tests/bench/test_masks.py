"""The sweep over masks: all masks at every length, judged, and per visible pair in the table."""

from dataclasses import replace

import pytest
import torch

from vdcore_bench.measure.journal import FILE, MASKS, Journal, Watch, parse
from vdcore_bench.suites import masks


@pytest.fixture
def rows(tmp_path):
    journal = Journal(tmp_path / FILE)
    small = replace(masks.EVERY, frames=(4, 6), tokens={"cpu": (2, 2)}, rounds=3)
    masks.sweep(journal, Watch(), of=small, flex=False)
    journal.close()
    return parse((tmp_path / FILE).read_text())


def test_every_mask_at_every_length_by_both(rows):
    found = {(row.case.removeprefix(MASKS), row.x, row.provider) for row in rows}
    names = (*masks.SWEEP, masks.RADIAL)
    assert found == {(name, T, who) for name in names for T in (4, 6) for who in ("vdcore", "sdpa")}
    assert all(row.samples == 3 and row.p50 > 0 and row.error_ratio <= 1 for row in rows)
    assert {row.reason for row in rows if row.case.endswith("chunk-causal")} == {"future 0, chunk 4"}


@pytest.mark.slow
def test_flex_attention_beside_teacher_forcing(tmp_path):
    """On padded sequences: 28 tokens of 128."""
    journal = Journal(tmp_path / FILE)
    masks.sweep(journal, Watch(), of=replace(masks.EVERY, frames=(4,), tokens={"cpu": (1, 7)}, rounds=3))
    journal.close()
    (row,) = [row for row in parse((tmp_path / FILE).read_text()) if row.provider == "flex"]
    assert row.variant == "padded" and row.case.endswith(masks.FORCED) and row.error_ratio <= 1
    assert any(
        "FlexAttention, padded" in line[0]
        for lines in masks.tables([*parse((tmp_path / FILE).read_text())]).values()
        for line in lines
    )


def test_the_table_counts_visible_pairs(rows):
    ((title, cells),) = masks.tables(rows).items()
    assert "float32, cpu" in title and len(cells) == 2 * (len(masks.SWEEP) + 1)
    visible = {(line[0].split(" (")[0], line[1]): line[2] for line in cells}
    assert visible["dense", "4"] == "100.0%" and visible["causal", "4"] == "62.5%" and visible["window", "6"] == "41.7%"


def test_a_wrong_mask_is_noticed():
    """The last frame's result is judged: one that sees a frame too many."""
    ours = masks.vdcore.video_attention

    def wrong(*args, mask=None, **kwargs):
        past = None if mask is None or mask.past is None else mask.past + 1
        return ours(*args, mask=masks.FrameMask(past, 0), **kwargs)

    workload = masks.load()[masks.EVERY.workload]
    shape = masks.Shape(B=1, T=6, rows=2, columns=2, H=2, G=2, D=16)
    job = masks.make("video_attention", workload, mask=masks.SWEEP["window"], shape=shape)
    tensors = job.tensors()
    with torch.no_grad():
        right, other = (f(**job.arguments(tensors)) for f in (ours, wrong))
    good, bad = masks._judge(job, tensors, [right, other])
    assert good <= 1 < bad


def test_lengths_are_drawn_where_radial_attention_has_four(tmp_path):
    journal = Journal(tmp_path / FILE)
    small = replace(masks.LONG, tokens={"cpu": (3, 5)}, rounds=3)
    masks.sweep(journal, Watch(), of=small)
    journal.close()
    rows = parse((tmp_path / FILE).read_text())
    ours = [row for row in rows if row.provider == "vdcore"]
    assert {(row.case.removeprefix(MASKS), row.x) for row in ours} == {
        (n, T) for n in small.names for T in small.frames
    }
    assert masks.picture(rows).startswith(b"\x89PNG")
    assert masks.picture([row for row in rows if row.x < 64]) is None
