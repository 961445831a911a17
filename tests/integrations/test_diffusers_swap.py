"""The swap itself: what it touches, and that everything else people do with models keeps working."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS, AttentionCalls, as_host, exact, gradients, run

import vdcore
from vdcore import FrameMask
from vdcore.integrations.diffusers import _host, _swap, swap_in, swap_out
from vdcore.testing import error_ratio

# One of every kind of change: a whole model, motion modules, blends, processors with norms and rotations.
KINDS = ("Latte", "AnimateDiff", "SVD", "Wan", "HunyuanVideo", "CogVideoX", "LTX2.3")


def swapped(name, **kwargs):
    model = MODELS[name].model()
    return model, swap_in(model, **kwargs)


def check(model, name):
    ours = run(model, name)
    assert error_ratio(ours, exact(name), [as_host(name)]).worst <= 1


def state(model):
    return [(type(m), id(m.__dict__.get("processor")), len(m._forward_pre_hooks)) for m in model.modules()]


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
    make, made = _swap.Change.make, []

    def fails(change):
        made.append(change)
        if len(made) == at + 1:
            raise KeyboardInterrupt
        make(change)

    monkeypatch.setattr(_swap.Change, "make", fails)
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


# ---- What others put into or around modules ----


class LoRA(nn.Module):
    """A linear layer with a low-rank addition, as adapters put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, input):
        return self.base_layer(input) + self.up(self.down(input))


def add_lora(model):
    torch.manual_seed(5)
    for module in list(model.modules()):
        for name in ("to_q", "to_v", "proj_in", "proj_out"):
            child = getattr(module, name, None)
            if type(child) is nn.Linear and type(module).__name__ != "LatteTransformer3DModel":
                setattr(module, name, LoRA(child))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_added_layers_are_served(name, when):
    host = MODELS[name].model()
    add_lora(host)
    want = run(host, name)
    assert not torch.equal(want, as_host(name))
    model = MODELS[name].model()
    if when == "before":
        add_lora(model)
    swap_in(model)
    if when == "after":
        add_lora(model)
    with AttentionCalls() as calls:
        torch.testing.assert_close(run(model, name), want, rtol=1e-4, atol=1e-4)
    assert calls.served


@pytest.mark.parametrize("name", KINDS)
def test_fused_projections(name):
    host = MODELS[name].model()
    if not hasattr(host, "fuse_qkv_projections"):
        pytest.skip("this host fuses no projections")
    for when in ("before", "after"):
        model = MODELS[name].model()
        if when == "after":
            swap_in(model)
        try:
            model.fuse_qkv_projections()
        except (ValueError, RuntimeError) as error:
            pytest.skip(f"this host cannot: {error}")
        if when == "before":
            swap_in(model)
        torch.testing.assert_close(run(model, name), as_host(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_forward_hooks_run(name):
    """On blocks, attention and layers alike, as often as without the swap."""

    def count(model):
        seen = []
        for key, module in model.named_modules():
            if not isinstance(module, (nn.Dropout, nn.Identity)):
                module.register_forward_hook(lambda *_, key=key: seen.append(key))
        run(model, name)
        return seen

    host = set(count(MODELS[name].model()))
    model, _ = swapped(name)
    ours = set(count(model))
    assert host == ours


@pytest.mark.parametrize("name", KINDS)
def test_replaced_forwards_are_left(name):
    """Offloading and caching replace forward on the instance: what they do must not be lost."""
    model = MODELS[name].model()
    replaced = [m for m in model.modules() if hasattr(m, "processor") or "Block" in type(m).__name__]
    calls = []
    for module in replaced:
        forward = module.forward

        def counted(*args, forward=forward, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        module.forward = counted
    run(model, name)
    want = len(calls)
    report = swap_in(model)
    assert any("forward is replaced" in entry.what for entry in report.left)
    calls.clear()
    assert error_ratio(run(model, name), exact(name), [as_host(name)]).worst <= 1
    assert len(calls) == want


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing(name):
    model, _ = swapped(name)
    want = gradients(model, name)
    model.enable_gradient_checkpointing()
    model.train()
    got = gradients(model, name)
    for key, dx in want.items():
        if dx is not None:
            torch.testing.assert_close(got[key], dx, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Wan", "Latte"])
def test_gradient_checkpointing_under_a_mask(name):
    model, _ = swapped(name, mask=FrameMask.causal())
    want = gradients(model, name)
    model.enable_gradient_checkpointing()
    model.train()
    got = gradients(model, name)
    for key, dx in want.items():
        if dx is not None:
            torch.testing.assert_close(got[key], dx, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Latte", "Wan"])
def test_compile(name):
    model, _ = swapped(name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, name), run(model, name), rtol=1e-4, atol=1e-4)


def test_compile_of_any_processor():
    """The copied function keeps its own names under torch.compile."""
    model, _ = swapped("SanaVideo")
    torch.compiler.reset()
    compiled = torch.compile(model.transformer_blocks[0].attn2, fullgraph=True, backend="aot_eager")
    x, text = torch.randn(2, 18, 24), torch.randn(2, 5, 24)
    with torch.no_grad(), AttentionCalls() as calls:
        out = compiled(x, text)
        torch.testing.assert_close(out, model.transformer_blocks[0].attn2(x, text), rtol=1e-4, atol=1e-4)
    assert calls.served >= 2 and not calls.torch


# ---- Backends of the host ----


def test_attention_backend_of_the_host_wins_after_the_swap():
    model, report = swapped("Wan")
    model.set_attention_backend("native")
    with AttentionCalls() as calls:
        check(model, "Wan")
    assert calls.served == 0 and calls.torch.total() == 4
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
        monkeypatch.setattr(_host, "FINGERPRINTS", {})
        monkeypatch.setattr(_host, "TESTED", ("0.42.0",))
        model = MODELS[name].model()
        report = swap_in(model)
        with AttentionCalls() as calls:
            check(model, name)
        assert calls.served and not calls.torch, (name, calls.torch)
        assert not any("modulate" in entry.what for entry in report.served)


def test_report_reads_well():
    model, report = swapped("SanaVideo")
    text = str(report)
    assert "served: 3" in text and "left: 2" in text
    assert "2 x Attention: its processor SanaLinearAttnProcessor3_0 calls no softmax attention" in text


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        host = run(MODELS[name].model(), name)
        model, _ = swapped(name)
        with AttentionCalls() as calls:
            ours = run(model, name)
    assert calls.served
    assert error_ratio(ours.bfloat16(), exact(name), [host.bfloat16()]).worst <= 1
