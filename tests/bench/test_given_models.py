"""Models of the user's own against frames: measured, predicted for a device that is not here, how many frames fit."""

import textwrap

import pytest
import torch

from vdcore_bench.measure.journal import FILE, Journal, Watch, parse
from vdcore_bench.suites.models import calls, given
from vdcore_bench.suites.sweep import Settings

MODELS = """
    import torch
    from torch import nn
    import torch.nn.functional as F

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return {"sample": F.scaled_dot_product_attention(q, k, v)}

    def plain(frames):
        return Attention(), {"x": torch.randn(1, 500 * frames, 32)}

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in "abc")

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    def residual(frames):
        return Residual(), {"x": torch.randn(4096 * frames, 64)}

    def called(frames):
        model, x = Attention(), torch.randn(1, 64 * frames, 32)
        return model, lambda: model(x)

    def odd(frames):
        if frames > 40:
            raise ValueError(f"{frames} frames are more than 40")
        return plain(frames)

    def reads(frames):
        model, x = Attention(), torch.randn(1, 64 * frames, 32)
        return model, lambda: model(x * float(x.mean().item()))

    def nothing(frames):
        return frames
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.chdir(tmp_path)


def test_naive_attention_takes_the_scores_more():
    usual, naive = (
        given.predict_memory(given.GivenPoint("my_models:plain", who, 8)) for who in (given.HOST, given.NAIVE)
    )
    scores = 2 * 4000**2 * 4
    assert usual < scores / 10 and scores < naive < 4 * scores


def test_prediction_is_near_what_is_measured():
    for who in (given.HOST, given.NAIVE):
        point = given.GivenPoint("my_models:plain", who, 8)
        assert 0.8 < given.measure_memory(point).bytes / given.predict_memory(point) < 1.25


@pytest.mark.parametrize(("mode", "buffers"), [("fwd", 3), ("fwd+bwd", 10)])
def test_prediction_counts_every_buffer_of_a_residual_net(mode, buffers):
    """Forward holds the sum, what is added, and the new sum; training 3 a block, and the gradient on its way."""
    point = given.GivenPoint("my_models:residual", given.HOST, 4, mode=mode)
    one = 4 * 4096 * 64 * 4
    assert given.predict_memory(point) == pytest.approx(buffers * one, rel=0.03)


@pytest.mark.slow  # beside other tests a buffer of theirs may come back while it measures
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_a_residual_net_takes_what_is_predicted(mode):
    point = given.GivenPoint("my_models:residual", given.HOST, 4, mode=mode)
    assert given.measure_memory(point).bytes == pytest.approx(given.predict_memory(point), rel=0.05)


def test_a_gradient_is_of_the_parameters():
    point = given.GivenPoint("my_models:called", given.HOST, 2, mode="fwd+bwd")
    made = point.make()
    gradients = made.call()
    assert [g.shape for g in gradients] == [p.shape for p in made.module.parameters()]
    assert all(g.abs().sum() > 0 for g in gradients)


def test_half_precision_is_torchs_default_dtype_in_the_function():
    module = given.GivenPoint("my_models:plain", given.HOST, 1, dtype=torch.bfloat16).make().module
    assert module.qkv.weight.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("spec", ["my_models:plain", "my_models:odd"])
def test_the_most_frames_fit_and_more_do_not(spec):
    curve = [given.GivenPoint(spec, given.HOST, n) for n in (3, 5)]
    row = given.most_frames(curve, Settings(memory_limit=20 * 2**20))
    assert row.metric == "frames" and row.status == "predicted" and row.p50 % 2 == 1
    point, most = given.GivenPoint(spec, given.HOST, int(row.p50)), 20 * 2**20
    assert given.predict_memory(point) <= most
    if spec == "my_models:odd":
        assert row.p50 == 39 and "more do not run: ValueError" in row.reason
    else:
        more = given.GivenPoint(spec, given.HOST, int(row.p50 * 1.03) + 2)
        assert given.predict_memory(more) > most
    small = given.most_frames(curve, Settings(memory_limit=1000))
    assert small.p50 == 0


def test_what_fake_tensors_cannot_do_is_measured_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(given, "rows_of", lambda base, estimate, *rest, note="": [estimate, note])
    estimate, note = given.measure(given.GivenPoint("my_models:reads", given.HOST, 1), Settings(), 0.0)
    assert estimate.need == 0 and note.startswith("not predicted: ")


def test_a_function_that_returns_something_else():
    with pytest.raises(TypeError, match=r"my_models:nothing: must return a module and .*, got 3"):
        given.GivenPoint("my_models:nothing", given.HOST, 3).make()
    with pytest.raises(TypeError, match=r"a model must return a tensor, .* got NoneType"):
        calls.first_tensor(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_memory_is_predicted_for_a_gpu_that_is_not_here(tmp_path):
    settings = Settings(frames=(2, 4), device="cuda", memory_limit=2**30)
    rows = given.profile("my_models:plain", (), settings, Journal(tmp_path / FILE), Watch())
    memory = [row for row in rows if row.metric == "memory" and row.provider == given.HOST]
    assert [row.status for row in memory] == ["predicted"] * 2 and 0 < memory[0].p50 < memory[1].p50
    assert "no GPU is visible" in memory[0].reason
    assert [row.status for row in rows if row.metric == "time"] == ["skipped"] * 6
    assert next(row for row in rows if row.metric == "frames").p50 > 4


def test_the_command(tmp_path, invoke, in_this_process):
    pytest.importorskip("diffusers")
    wan = """
        import diffusers
        import torch

        def wan(frames):
            model = diffusers.WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
                ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            )
            video, text = torch.randn(1, 4, frames, 8, 8), torch.randn(1, 4, 8)
            return model, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([500])}
    """
    (tmp_path / "my_wan.py").write_text(textwrap.dedent(wan))
    given_options = ("--model", "my_wan:wan", "--mask", "causal", "--frames", "2", "--memory-limit", "64MiB")
    text = invoke("profile", *given_options, "--out", tmp_path / "out")
    assert "The most frames" in text and "vdcore, causal" in text and (tmp_path / "out" / "report.html").is_file()
    rows = parse((tmp_path / "out" / FILE).read_text())
    measured = {(r.provider, r.variant, r.x) for r in rows if r.status == "ok" and r.metric == "memory"}
    who = [(given.HOST, ""), (given.NAIVE, ""), (given.SWAPPED, ""), (given.SWAPPED, "causal")]
    assert measured == {(*one, 2) for one in who}
    assert len([r for r in rows if r.metric == "frames" and r.p50 > 2]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "my_models:none"), "has no function 'none'"),
        (("--model", "no_such:f"), "importing 'no_such' failed"),
        (("--model", "my_models:plain", "--mask", "radial"), "rows and columns are not known before a call"),
        (("--model", "my_models:plain", "--mask", "blue"), "expected one of dense"),
        (("--model", "my_models:plain", "--attention", "sdpa"), "it is of workloads and VDiT variants"),
        (("--model", "vdit-full", "--mask", "causal"), "it goes with --model module:function"),
    ],
)
def test_wrong_options_end_with_2(options, said, invoke):
    assert said in " ".join(invoke("profile", *options, code=2).replace("│", "").split())
