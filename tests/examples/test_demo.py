"""The experiments of the demo at a size for tests, and the report made of their figures."""

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

import experiments
from experiments import (
    causal_encoder,
    inflation,
    latte_weights,
    rolling_cache,
    splicing,
    train_sample,
)
from experiments.figure import Figure
from vdcore import FrameMask
from vdcore.cli.commands import app
from vdcore.diffusion.training import Recipe, load_trained
from vdcore.models import VDiTConfig
from vdcore_bench.report.table import Table

MODEL = VDiTConfig(in_channels=3, patch=(1, 8, 8), width=16, depth=1, heads=2, position="sincos+rope", qk_norm=True)
RECIPE = Recipe(model=MODEL, frames=8, size=(16, 16), batch=2, steps=4, warmup=2, hold=0.5)


def complete(figure, out):
    """Saved, every number finite, all files there."""
    assert Figure.load(out / f"{figure.name}.json").passed == figure.passed
    assert figure.files and all((out / name).stat().st_size > 50 for name in figure.files)
    return figure


def test_train_sample(tmp_path):
    figure = complete(train_sample.run(tmp_path, RECIPE, samples=4, steps=2), tmp_path)
    numbers = figure.numbers
    assert numbers["error_ratio"] == pytest.approx(
        numbers["samples"]["warping_error"] / numbers["real"]["warping_error"], rel=1e-3
    )
    assert figure.passed == (numbers["error_ratio"] <= 2 and 0.5 <= numbers["motion_ratio"] <= 2)
    assert load_trained(train_sample.checkpoint(tmp_path)).step == 4


@pytest.mark.slow
def test_splicing(tmp_path):
    train_sample.run(tmp_path, RECIPE, samples=4, steps=1)
    settings = splicing.Settings(frames=(32,), together=2, videos=1, steps=2)
    figure = complete(splicing.run(tmp_path, settings), tmp_path)
    whole, spliced = (figure.numbers[f"peak_bytes_{kind}"] for kind in ("whole", "spliced"))
    assert 0 < spliced[32] < 0.7 * whole[32]  # at this size libraries take much of both
    assert figure.numbers["memory_share"] == pytest.approx(spliced[32] / whole[32], rel=1e-3)


def test_seams_are_seen_where_they_are():
    video = torch.linspace(0, 1, 12)[None, None, :, None, None].expand(1, 3, 12, 4, 4).clone()
    assert splicing.seam_ratio(video, [4, 8]) == pytest.approx(1)
    video[:, :, 4:] += 3 / 11
    assert splicing.seam_ratio(video, [4]) == pytest.approx(4)


def test_rolling_cache(tmp_path):
    mask = FrameMask(past=2, future=0, chunk=2, sink=2)
    settings = rolling_cache.Settings(frames=24, size=(8, 8), width=16, depth=2, steps=1, mask=mask)
    figure = complete(rolling_cache.run(tmp_path, settings), tmp_path)
    assert figure.numbers["error_ratio"] <= 1
    assert figure.numbers["cache_bytes"] == figure.compared_with["cache_bytes_before_the_first_frame"] > 0


def test_latte_weights(tmp_path):
    settings = latte_weights.Settings(heads=2, head_dim=12, layers=1, text_width=16, frames=3, latent=8, text=5)
    figure = complete(latte_weights.run(tmp_path, settings), tmp_path)
    assert figure.passed and 0 < figure.numbers["error_ratio"] <= 1
    assert figure.numbers["weights"] == figure.numbers["weights_of_ours"]


def test_inflation(tmp_path):
    settings = inflation.Settings(width=16, depth=1, image_steps=3, video_steps=3, batch=2)
    figure = complete(inflation.run(tmp_path, settings), tmp_path)
    assert figure.passed and figure.numbers["largest_difference_at_step_0"] == 0
    assert figure.compared_with["largest_difference_after_training_both"] > 0


def test_causal_encoder(tmp_path):
    settings = causal_encoder.Settings(widths=(8, 8, 8), steps=2, frames=17)
    figure = complete(causal_encoder.run(tmp_path, settings), tmp_path)
    assert figure.passed and figure.numbers["error_ratio"] <= 1
    assert figure.compared_with["largest_difference_looking_ahead"] > 1e-3


# ---- The report and the command ----


def experiment(name, passed=True):
    def run(out):
        (out / f"{name}.png").write_bytes(b"picture")
        (out / f"{name}.mp4").write_bytes(b"film")
        table = Table.of(("a", "b"), [("x", 1)], note="A table of <things>.")
        files = [f"{name}.png", f"{name}.mp4"]
        numbers, limits = {"n": {"deep": 1.5}}, {"limit": 2}
        captions = {f"{name}.png": f"Picture of {name}."}
        return Figure(name, f"claim of {name}", numbers, limits, passed, "small", files, table, captions).save(out)

    return run


@pytest.fixture
def stubs(monkeypatch):
    """Experiments that are over at once; each call is noted."""
    calls, behaviour = [], {}

    def load(name):
        calls.append(name)
        return behaviour.get(name, experiment(name))

    monkeypatch.setattr(experiments, "load", load)
    return calls, behaviour


def demo(*args):
    result = CliRunner().invoke(app, ["demo", *map(str, args)])
    return result.exit_code, result.output


def test_all_of_it(stubs, tmp_path):
    calls, _ = stubs
    code, output = demo("all", "--out", tmp_path)
    assert code == 0, output
    assert calls == list(experiments.EXPERIMENTS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] and list(summary["figures"]) == calls and not summary["missing"]
    assert summary["figures"]["horizon"]["numbers"] == {"n": {"deep": 1.5}}
    page = (tmp_path / "report.html").read_text()
    assert all(f"claim of {name}" in page and f"Picture of {name}." in page for name in calls)
    for name in calls:  # each says to a stranger what was done
        section = page[page.index(f'id="{name}"') :]
        said = re.findall(r"<p>([^<].+?)</p>", section[: section.find("<h2", 5)], re.DOTALL)
        assert len(" ".join(said)) > 200, name
    assert "<code>x + v dt</code>" in page
    assert "n: deep" in page and "A table of &lt;things&gt;." in page and "<td>1</td>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # opens offline, wherever it is moved


def test_what_is_there_is_not_made_again(stubs, tmp_path):
    calls, _ = stubs
    demo("horizon", "flicker", "--out", tmp_path)
    assert calls == ["horizon", "flicker"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["figures"]) == {"horizon", "flicker"} and "splicing" in summary["missing"]
    code, output = demo("horizon", "splicing", "--out", tmp_path)
    assert code == 0 and calls == ["horizon", "flicker", "splicing"] and "horizon: there already" in output
    demo("horizon", "--fresh", "--out", tmp_path)
    assert calls[3:] == ["horizon"]


def test_a_failure_costs_one_experiment(stubs, tmp_path):
    calls, behaviour = stubs

    def broken(out):
        raise RuntimeError("no luck")

    behaviour["flicker"] = broken
    code, output = demo("all", "--out", tmp_path)
    assert code == 1 and len(calls) == len(experiments.EXPERIMENTS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == {"flicker": "RuntimeError: no luck"} and not summary["passed"]
    assert "no luck" in (tmp_path / "report.html").read_text()
    del behaviour["flicker"]
    code, _ = demo("all", "--out", tmp_path)
    assert code == 0 and calls[len(experiments.EXPERIMENTS) :] == ["flicker"]


def test_an_interrupt_keeps_what_is_done(stubs, tmp_path):
    calls, behaviour = stubs

    def interrupted(out):
        raise KeyboardInterrupt

    behaviour["horizon"] = interrupted
    code, output = demo("all", "--out", tmp_path)
    assert code == 130 and calls == ["train_sample", "flicker", "horizon"] and "goes on from here" in output
    assert set(json.loads((tmp_path / "summary.json").read_text())["figures"]) == {"train_sample", "flicker"}


def test_a_claim_that_does_not_hold_is_exit_code_1(stubs, tmp_path):
    _, behaviour = stubs
    behaviour["inflation"] = experiment("inflation", passed=False)
    code, output = demo("inflation", "--out", tmp_path)
    assert code == 1 and "inflation: DOES NOT HOLD" in output
    assert not json.loads((tmp_path / "summary.json").read_text())["passed"]


def test_unknown_names(tmp_path):
    code, output = demo("flickr", "--out", tmp_path)
    assert code == 2 and "known are all, train_sample, flicker" in re.sub(r"\s+", " ", output)
    with pytest.raises(ValueError, match="demo: flickr must be one of"):
        experiments.load("flickr")


def test_without_a_checkout_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["vdcore.cli.demo"], "EXAMPLES", tmp_path / "examples")
    code, output = demo("horizon", "--out", tmp_path / "out")
    assert code == 2 and output.count("\n") == 1 and "clone the repository" in output
    assert not (tmp_path / "out").exists()
