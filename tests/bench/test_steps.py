"""Denoising steps of whole pipelines: rows of three calls and of the decoding, and what stands in them."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import torch.nn.functional as F
from torch import nn

from vdcore_bench.measure.journal import FILE, Journal, Watch, parse
from vdcore_bench.report import pictures, results
from vdcore_bench.suites import Options
from vdcore_bench.suites.models import step_tables, steps
from vdcore_bench.suites.models.pipelines import PIPELINES, Pipeline
from vdcore_bench.suites.models.steps import Step
from vdcore_bench.workloads import load

NAME = "Wan 1.3B step"
REAL = dict(PIPELINES)


def tiny_wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def tiny_inputs(T, H, W):
    video, text = torch.randn(1, 4, T, H, W), torch.randn(1, 4, 8)
    return {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([500])}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """In place of Wan."""
    made = Pipeline(
        model=tiny_wan,
        inputs=tiny_inputs,
        autoencoder=lambda: diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        latents=lambda T, H, W: {"z": torch.randn(1, 4, T, H, W)},
        layers="1 of 30 blocks",
        size=(9, 8, 8),
        small=(5, 4, 6),
        decoded=(2, 4, 4),
        mask=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIPELINES, NAME, made)
        yield


def measured(folder, **options):
    journal = Journal(folder / FILE)
    steps.run([NAME], Options(seconds=0.01, rounds=3, **options), journal, Watch())
    journal.close()
    return journal.rows


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    found = measured(folder)
    assert len((folder / FILE).read_text().splitlines()) == len(found)
    return found


def test_rows(rows):
    assert {row.status for row in rows} == {"ok"} and len({row.key() for row in rows}) == len(rows)
    (group,) = step_tables.lines(rows).values()
    assert [line.job.provider for line in group] == [steps.HOST, steps.SWAPPED, steps.SWAPPED, steps.HOST]
    host, swapped, masked, decoding = group
    for line in group:
        assert line.seconds > 0 and line.metrics["memory"].p50 >= 0
        assert sum(line.share(column) for column in step_tables.COLUMNS) == pytest.approx(1)
        assert "latents 9 x 8 x 8 -> 5 x 4 x 6" in line.job.scaling
    assert all(line.share("attention") > 0 for line in (host, swapped, masked))
    assert decoding.share("convolutions") > 0 and decoding.job.shape == {"T": 2, "H": 4, "W": 4}
    assert "1 of 30 blocks" in host.job.scaling and "2 x 4 x 4 of them decoded" in decoding.job.scaling
    assert "% of the operations" in host.reason


def change(text):
    return float(text.partition("by ")[2].split()[0])


def test_a_mask_changes_the_result_and_says_so(rows):
    (_, swapped, masked, _), *_ = step_tables.lines(rows).values()
    assert change(swapped.reason) < 1e-5 and "mask" not in swapped.reason
    assert "the mask changes the result" in masked.reason and change(masked.reason) > 1e-3
    assert "52 % of the pairs of frames" in masked.reason and masked.job.variant == "frames:1"


def test_tables_and_report(rows):
    cells = step_tables.cells(rows)
    assert len(cells) == 4 and all(len(line) == len(step_tables.HEADER) for line in cells)
    assert [line[3] for line in cells][::3] == ["1.00x", "-"]  # decoding is not raced
    said = step_tables.sentences(rows)
    assert len(said) == 3 and "which change the result" in said[0] and "of the host's time" in said[1]
    page = results.report(rows, pictures.draw(rows))
    assert page.index("which change the result") < page.index("What the time of a step goes to")
    assert page.index("What the time of a step goes to") < page.index("A denoising step") < page.index("Machine and")
    assert "A denoising step" in page and "What ran in these steps" in page


def test_an_interrupt_loses_no_row(tmp_path, monkeypatch):
    def race(contenders, rounds, clock, until):
        contenders["0"].samples.append(contenders["0"].run(clock))
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "race", race)
    monkeypatch.setattr(steps, "attention_share", lambda step: "")
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    rows = parse((tmp_path / FILE).read_text())
    assert [row.metric for row in rows].count("memory") == 3
    assert [row.provider for row in rows if row.metric == "time"] == [steps.HOST]


def test_what_does_not_fit_is_said(tmp_path):
    (row,) = measured(tmp_path, memory_limit=1000)
    assert row.status == "predicted" and "the limit is 1000 B" in row.reason and row.p50 > 1000


def test_a_model_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "predicted_need", lambda step: (0, 0))
    monkeypatch.setattr(steps, "measure", lambda *given: 1 / 0)
    (row,) = measured(tmp_path)
    assert row.status == "failed" and "ZeroDivisionError" in row.reason


class OneLayer(nn.Module):
    """Attention over N tokens of 16 channels behind one product."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def test_attentions_share_is_counted(monkeypatch):
    one = replace(PIPELINES[NAME], model=OneLayer, inputs=lambda T, H, W: {"x": torch.randn(1, T * H * W, 16)})
    monkeypatch.setitem(PIPELINES, NAME, one)
    n = 5 * 4 * 6
    attention, products = 4 * n * n * 16, 2 * n * 16 * 48
    assert steps.counted_share(Step(NAME)) == pytest.approx(attention / (attention + products))


def test_in_half_precision(rows):
    """The same numbers, rounded."""
    wide, half = (Step(NAME, dtype) for dtype in (torch.float32, torch.bfloat16))
    (weight, *_), (rounded, *_) = (list(step.made(tiny_wan).parameters()) for step in (wide, half))
    assert rounded.dtype == torch.bfloat16 and torch.equal(weight.bfloat16(), rounded)
    x, y = (step.drawn(tiny_inputs, step.size)["hidden_states"] for step in (wide, half))
    assert torch.equal(x.bfloat16(), y) and half.drawn(tiny_inputs, half.size)["timestep"].dtype == torch.int64


WORKLOADS = {
    "Latte step": "latte-1-512",
    "AnimateDiff step": "animatediff-level1",
    "SVD step": "svd-xt-level1",
    "Wan 1.3B step": "self-forcing-1.3b",
    "LTX step": "ltx-2b-704p",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_heads_are_those_of_the_workload(name):
    workload = load()[WORKLOADS[name]]
    with torch.device("meta"):
        model = REAL[name].model()
    widths = {(m.heads, m.to_q.out_features // m.heads) for m in model.modules() if hasattr(m, "to_q")}
    assert (workload.heads, workload.head_dim) in widths


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_attentions_share_grows_to_the_pipelines_own_size(name, monkeypatch):
    monkeypatch.setitem(PIPELINES, name, REAL[name])
    assert 0 < steps.counted_share(Step(name)) < steps.counted_share(Step(name, full=True)) < 1


def test_from_the_command_line(rows, tmp_path, invoke, monkeypatch):
    def run(names, options, journal, watch):
        with watch.part("A denoising step"):
            journal.add(rows)
            watch.done(rows)

    monkeypatch.setattr(steps, "run", run)
    text = invoke("bench", "--model", NAME, "--out", tmp_path)
    assert "A denoising step" in text and steps.DECODING in text and "the mask changes the result" in text
    assert steps.ALL in invoke("bench", "--model", "NoSuchModel", code=2)
    assert "A denoising step" in (tmp_path / "report.html").read_text()
