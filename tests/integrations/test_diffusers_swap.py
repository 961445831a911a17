"""The swap itself: what it touches, its copies, what it leaves and says so, and the hosts that it refuses."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS, AttentionCalls, as_host, exact, run
from support import run_python
from swapping import KINDS, check, state, swapped

import vdcore
from vdcore import FrameMask
from vdcore.integrations import swap
from vdcore.integrations.diffusers import fingerprints, swap_in, swap_out
from vdcore.testing import error_ratio

# ---- What it touches ----


def test_two_models_side_by_side():
    ours, host, want = MODELS["Wan"].model(), MODELS["Wan"].model(), as_host("Wan")
    swap_in(ours)
    with AttentionCalls() as calls:
        assert torch.equal(run(host, "Wan"), want)
    assert calls.served == 0 and calls.torch.total() == 4
    with AttentionCalls() as calls:
        run(ours, "Wan")
    assert calls.served == 4 and calls.torch.total() == 0


def test_nothing_global_changes():
    from diffusers.models import attention_dispatch, attention_processor

    modules = (attention_dispatch, attention_processor, torch.nn.functional)
    before = [dict(module.__dict__) for module in modules]
    members = set(attention_dispatch.AttentionBackendName.__members__)
    for name in KINDS:
        run(swapped(name)[0], name)
    assert [dict(module.__dict__) for module in modules] == before
    assert set(attention_dispatch.AttentionBackendName.__members__) == members


@pytest.mark.parametrize("name", KINDS)
def test_twice_is_once(name):
    model, first = swapped(name)
    before = state(model)
    second = swap_in(model)
    assert state(model) == before
    assert (second.served, second.left) == (first.served, first.left)
    swap_out(model)
    assert torch.equal(run(model, name), as_host(name))


def test_another_mask_replaces_the_first():
    model, _ = swapped("Wan", mask=FrameMask.causal())
    swap_in(model, mask=FrameMask.same_frame())
    fresh, _ = swapped("Wan", mask=FrameMask.same_frame())
    assert torch.equal(run(model, "Wan"), run(fresh, "Wan"))
    swap_in(model)
    check(model, "Wan")
    swap_out(model)
    swap_out(model)  # what is not swapped stays as it is
    assert torch.equal(run(model, "Wan"), as_host("Wan"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_on_the_way_restores(name, at, monkeypatch):
    model = MODELS[name].model()
    before = state(model)
    make, made = swap.Change.make, []

    def fails(change):
        made.append(change)
        if len(made) == at + 1:
            raise KeyboardInterrupt
        make(change)

    monkeypatch.setattr(swap.Change, "make", fails)
    with pytest.raises(KeyboardInterrupt):
        swap_in(model)
    assert state(model) == before
    assert torch.equal(run(model, name), as_host(name))


@pytest.mark.parametrize("name", KINDS)
def test_an_error_in_a_call_leaves_it_swapped(name):
    model, _ = swapped(name)
    with pytest.raises(Exception):  # noqa: B017
        model(torch.randn(1))
    check(model, name)


def test_parameters_and_names_stay():
    for name in KINDS:
        model = MODELS[name].model()
        names = [(key, id(p)) for key, p in model.named_parameters()]
        kinds = [type(m).__name__ for m in model.modules()]
        swap_in(model)
        assert [(key, id(p)) for key, p in model.named_parameters()] == names
        assert [type(m).__name__ for m in model.modules()] == kinds
        assert isinstance(model, type(MODELS[name].build()))


# ---- Copies ----


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped_and_swap_out(name, way):
    model, _ = swapped(name)
    want = run(model, name)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    swap_out(model)  # the copy shares nothing with it
    with AttentionCalls() as calls:
        assert torch.equal(run(other, name), want)
    assert calls.served
    swap_out(other)
    assert torch.equal(run(other, name), as_host(name))


@pytest.mark.parametrize("name", ["Latte", "Wan"])
def test_a_masked_copy_keeps_its_mask(name):
    model, _ = swapped(name, mask=FrameMask.causal())
    want = run(model, name)
    assert torch.equal(run(copy.deepcopy(model), name), want)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), name), want)


def test_saving_names_the_hosts_class(tmp_path):
    model, _ = swapped("Latte")
    model.save_pretrained(tmp_path)
    again = diffusers.LatteTransformer3DModel.from_pretrained(tmp_path).eval()
    assert type(again) is diffusers.LatteTransformer3DModel
    assert torch.equal(run(again, "Latte"), as_host("Latte"))


def test_dtype_conversion():
    for name in ("Latte", "CogVideoX"):
        model, _ = swapped(name)
        model.to(torch.bfloat16)
        out = run(model, name, torch.bfloat16)
        host = MODELS[name].model().to(torch.bfloat16)
        assert error_ratio(out, exact(name), [run(host, name, torch.bfloat16)]).worst <= 1


# ---- Backends of the host ----


def test_attention_backend_of_the_host_wins_after_the_swap():
    model, report = swapped("Wan")
    model.set_attention_backend("native")
    with AttentionCalls() as calls:
        run(model, "Wan")
    assert calls.served == 0 and calls.torch.total() == 4
    check(model, "Wan")
    assert any("set_attention_backend" in entry.what for entry in report.left)
    model.reset_attention_backend()
    with AttentionCalls() as calls:
        run(model, "Wan")
    assert calls.served == 4


def test_named_backend_is_used():
    model, _ = swapped("Wan")
    before = vdcore.calls()
    with vdcore.use_backend("reference"):
        check(model, "Wan")
    assert {backend for _, backend, _ in vdcore.calls() - before} == {"reference"}


# ---- Pipelines, unknown models, versions ----


def test_pipeline():
    transformer = MODELS["Latte"].model()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=4)
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.LattePipeline(None, None, vae, transformer, scheduler)
    inside = state(vae)
    report = swap_in(pipeline)
    assert any(entry.name.startswith("transformer.") for entry in report.served)
    assert ("vae", "an autoencoder") in {(entry.name, entry.what) for entry in report.left}
    assert state(vae) == inside
    check(transformer, "Latte")
    swap_out(pipeline)
    assert torch.equal(run(transformer, "Latte"), as_host("Latte"))


class Parts:
    """What a pipeline is to the swap."""

    def __init__(self, **components):
        self.components = components


def test_a_refused_mask_changes_nothing():
    """Neither before nor after an earlier swap, whichever of a pipeline's models it is refused for."""
    wan, unknown = MODELS["Wan"].model(), image_model()
    for first in (lambda: None, lambda: swap_in(wan), lambda: swap_in(wan, FrameMask.window(1))):
        first()
        before = state(wan)
        with pytest.raises(ValueError, match=r"mask must be None for .*, whose frames are not known"):
            swap_in(Parts(transformer=wan, other=unknown), FrameMask.causal())
        assert state(wan) == before


def image_model():
    """A model of diffusers that has no frames."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=4,
    )


def test_one_model_under_two_names():
    wan = MODELS["Wan"].model()
    report = swap_in(Parts(transformer=wan, transformer_2=wan), FrameMask.causal())
    names = {entry.name.partition(".")[0] for entry in report.served}
    assert names == {"transformer", "transformer_2"}
    assert torch.equal(run(wan, "Wan"), run(swapped("Wan", mask=FrameMask.causal())[0], "Wan"))
    swap_out(wan)
    assert torch.equal(run(wan, "Wan"), as_host("Wan"))


@pytest.mark.parametrize("ran", [False, True])
def test_a_mask_for_a_compiled_model(ran):
    torch.compiler.reset()
    compiled = torch.compile(MODELS["Wan"].model(), backend="aot_eager")
    if ran:
        run(compiled, "Wan")
    swap_in(compiled, FrameMask.causal())
    want = run(swapped("Wan", mask=FrameMask.causal())[0], "Wan")
    torch.testing.assert_close(run(compiled, "Wan"), want, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="swap_in: model_or_pipeline must be a model or a pipeline"):
        swap_in(object())
    with pytest.raises(TypeError, match="swap_in: mask must be a FrameMask"):
        swap_in(MODELS["Wan"].model(), mask="causal")


def test_unknown_models_are_served_where_exact():
    """An image model that this package has never heard of: its attention is served, by the host's own code."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
    ).eval()
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([3, 7]),
    }
    with torch.no_grad():
        want = model(**given).sample
        swap_in(model)
        with AttentionCalls() as calls:
            got = model(**given).sample
        assert calls.served == 2 and not calls.torch
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        swap_out(model)
        assert torch.equal(model(**given).sample, want)


def test_processors_with_weights_are_left():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    model = MODELS["AnimateDiff"].model()
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.set_processor(IPAdapterAttnProcessor2_0(16, 16, num_tokens=(4,)))
    report = swap_in(model)
    (entry,) = [e for e in report.left if e.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert "parameters of its own" in entry.what
    assert isinstance(attn.processor, IPAdapterAttnProcessor2_0)


def test_attention_mask_of_self_attention_is_honoured():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8).eval()
    x, mask = torch.randn(2, 6, 16), torch.randn(2, 1, 6)
    with torch.no_grad():
        want = attn(x, attention_mask=mask)
        report = swap_in(attn)
        assert torch.equal(attn(x, attention_mask=mask), want)
        assert any("attention mask" in entry.what for entry in report.left)


@pytest.mark.parametrize("first", [True, False], ids=["padding sees the first token", "padding sees nothing"])
def test_masks_of_padded_texts_are_served(first):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8).eval()
    x, valid = torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([[6], [4], [1]])
    pairs = valid[:, None, :, None] & valid[:, None, None]
    seen = valid | first  # rows of padding that see nothing are the host's own affair
    pairs[..., 0] |= first
    with torch.no_grad():
        want = attn(x, attention_mask=pairs)
        report = swap_in(attn)
        with AttentionCalls() as calls:
            ours = attn(x, attention_mask=pairs)
        assert calls.served == 1 and not report.left
        torch.testing.assert_close(ours[seen], want[seen])
        assert ours.isfinite().all()
        pairs[1, :, 2, 3] = False
        assert torch.equal(attn(x, attention_mask=pairs), attn.processor.host(attn, x, attention_mask=pairs))
        assert any("not one of padding" in entry.what for entry in report.left)


@pytest.mark.parametrize(
    "config",
    [
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"norm_num_groups": 4},
        {"spatial_norm_dim": 32},
        {"cross_attention_norm": "layer_norm"},
        {"qk_norm": "l2"},
        {"qk_norm": "layer_norm"},
        {"qk_norm": "rms_norm"},
        {"upcast_attention": True},
    ],
    ids=lambda config: next(iter(config)) + "=" + str(next(iter(config.values()))),
)
def test_attributes_that_change_the_mathematics(config):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, cross_attention_dim=16, **config).eval()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.1 * torch.randn_like(p))
        x, text, given = torch.randn(2, 6, 32), torch.randn(2, 5, 16), {}
        if "spatial_norm_dim" in config:
            x, given = torch.randn(2, 32, 6, 1), {"temb": torch.randn(2, 32, 6, 1)}
        want = attn(x, encoder_hidden_states=text, **given)
        swap_in(attn)
        torch.testing.assert_close(attn(x, encoder_hidden_states=text, **given), want, rtol=1e-5, atol=1e-5)


def test_another_major_version_is_an_error(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "1.2.0")
    model = MODELS["Wan"].model()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"diffusers 1.2.0 has a major version .* tested: 0.42.1"):
        swap_in(model)
    assert state(model) == before


def test_code_that_changed_is_run_as_it_is(monkeypatch):
    """A newer diffusers with other code in a block: its own code runs, with its attention alone served."""
    for name in ("Latte", "Wan", "AnimateDiff"):
        monkeypatch.setattr(fingerprints, "FINGERPRINTS", {})
        monkeypatch.setattr(fingerprints, "TESTED", ("0.42.0",))
        model = MODELS[name].model()
        report = swap_in(model)
        with AttentionCalls() as calls:
            run(model, name)
        assert calls.served and not calls.torch, (name, calls.torch)
        check(model, name)
        assert not any("modulate" in entry.what for entry in report.served)


def test_report_reads_well():
    model, report = swapped("SanaVideo")
    text = str(report)
    assert "served: 6" in text and "left: 2" in text
    assert "2 x Attention: its processor SanaLinearAttnProcessor3_0 calls no softmax attention" in text


def test_the_report_names_a_slow_dtype():
    """bfloat16 on a CPU without instructions for it, as which this one runs."""
    code = """
import torch
from zoo import MODELS
from vdcore.integrations.diffusers import swap_in
print(swap_in(MODELS["Wan"].model(torch.float32)).notes)
print("\\n".join(swap_in(MODELS["Wan"].model(torch.bfloat16)).notes))
"""
    slow = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    said = run_python(code, PYTHONPATH=str(Path(__file__).parent), **slow).splitlines()
    assert said[0] == "[]" and "times as long in bfloat16 as in float32" in said[1]
