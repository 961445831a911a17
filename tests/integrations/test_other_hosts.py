"""Adapters of hosts that are not installed here, against stand-ins."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from stand_ins import (
    MMSingleStreamBlock,
    Patcher,
    STDiT3Block,
    TokenRefinerBlock,
    WanSelfAttention,
    flash_attention,
    optimized_attention,
)
from torch import nn

import vdcore
from vdcore.integrations import comfyui, hunyuan_video, open_sora, wan
from vdcore.integrations.report import Entry


def close(ours, host, tolerance=1e-5):
    torch.testing.assert_close(ours, host, rtol=tolerance, atol=tolerance)


def names(report):
    return [entry.name for entry in report.served]


def attention_calls():
    return sum(n for (op, _, _), n in vdcore.calls().items() if op.endswith("attention"))


# ---- ComfyUI ----


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("keys", [6, 9])
def test_comfyui(skip_reshape, skip_output_reshape, keys):
    shape = (2, 3, -1, 8) if skip_reshape else (2, -1, 24)
    q, k, v = (torch.randn([n if s == -1 else s for s in shape]) for n in (6, keys, keys))
    flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    host = optimized_attention(q, k, v, 3, **flags)
    model = Patcher({"transformer_options": {"other": 1}})
    swapped = model.clone()
    comfyui.swap_in(swapped)
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    options = swapped.model_options["transformer_options"]
    before = attention_calls()
    ours = optimized_attention(q, k, v, 3, transformer_options=options, **flags)
    assert attention_calls() == before + 1
    close(ours, host)


def test_comfyui_leaves_masks_and_precisions():
    q, k, v = (torch.randn(2, 6, 24) for _ in range(3))
    options = {"optimized_attention_override": comfyui.attention_override}
    before = attention_calls()
    for given in ({"mask": torch.randn(6, 6)}, {"attn_precision": torch.float64}):
        want = optimized_attention(q, k, v, 3, **given)
        assert torch.equal(optimized_attention(q, k, v, 3, transformer_options=options, **given), want)
    assert attention_calls() == before


def test_comfyui_respects_other_overrides():
    with pytest.raises(ValueError, match="no other optimized_attention_override"):
        comfyui.swap_in(Patcher({"transformer_options": {"optimized_attention_override": print}}))


@pytest.mark.parametrize(
    "options",
    [{}, {"transformer_options": {}}, {"other": 1, "transformer_options": {"optimized_attention_override": None}}],
    ids=str,
)
def test_comfyui_options_come_back_as_they_were(options):
    model = Patcher(dict(options))
    comfyui.swap_in(model)
    assert callable(model.model_options["transformer_options"]["optimized_attention_override"])
    comfyui.swap_out(model)
    assert model.model_options == options


@pytest.mark.parametrize(("q", "k"), [((2, 3, 6, 8), (2, 2, 6, 8)), ((2, 4, 6, 8), (1, 4, 6, 8))], ids=str)
def test_comfyui_leaves_shapes_that_do_not_fit(q, k):
    asked = []
    override = comfyui.AttentionOverride()
    override(lambda *args, **kwargs: asked.append(args), torch.randn(q), *(torch.randn(k),) * 2, 3, skip_reshape=True)
    assert len(asked) == 1


# ---- Wan and HunyuanVideo: functions of the host, used by name in its modules ----


def test_wan():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Identity(), nn.ModuleList([WanSelfAttention()]))
    x, lengths = torch.randn(2, 7, 16), torch.tensor([7, 4])
    want = host[1][0](x, lengths)
    model = copy.deepcopy(host)
    assert names(wan.swap_in(model)) == ["1.0"] == names(wan.swap_in(model))
    before = attention_calls()
    close(model[1][0](x, lengths), want)
    again = pickle.loads(pickle.dumps(model))
    close(again[1][0](x, lengths), want)
    assert attention_calls() == before + 2
    assert torch.equal(host[1][0](x, lengths), want) and attention_calls() == before + 2
    wan.swap_out(model)
    assert type(model[1][0]) is WanSelfAttention
    assert torch.equal(model[1][0](x, lengths), want)


def test_wan_scales_and_dtypes():
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    close(wan.flash_attention(q, k, v, q_scale=0.5), flash_attention(q, k, v, q_scale=0.5))
    close(wan.attention(q, k, v, fa_version=2), flash_attention(q, k, v))
    assert wan.flash_attention(q.bfloat16(), k, v).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="window_size"):
        wan.flash_attention(q, k, v, window_size=(1, 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_hunyuan_video_refines_text_under_a_dense_mask(dtype):
    torch.manual_seed(0)
    block, x = TokenRefinerBlock(), torch.randn(2, 5, 16)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    seen = (valid[:, None, :, None] & valid[:, None, None]) | torch.eye(5, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    q, k, v = (y.transpose(1, 2) for y in block.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    report = hunyuan_video.swap_in(block)
    assert names(report) == ["TokenRefinerBlock"] and not report.left
    close(block(x, mask), want)
    (left,) = report.left
    assert left.name == "TokenRefinerBlock" and "torch's attention runs" in left.what
    with pytest.raises(NotImplementedError, match="mode flash"):
        hunyuan_video.attention(q, k, v, attn_mask=mask)


def test_hunyuan_video():
    torch.manual_seed(0)
    model, x = nn.ModuleList([MMSingleStreamBlock()]), torch.randn(2, 7, 16)
    bounds = torch.tensor([0, 5, 7, 7 + 7, 14], dtype=torch.int32)  # 5 and 7 valid tokens
    want = model[0](x, bounds)
    assert names(hunyuan_video.swap_in(model)) == ["0"]
    ours = model[0](x, bounds)
    close(ours[0, :5], want[0, :5])
    close(ours[1], want[1])
    hunyuan_video.swap_out(model)
    assert torch.equal(model[0](x, bounds), want)
    with pytest.raises(ValueError, match="must hold 3 bounds, got 5"):
        q = torch.randn(1, 7, 2, 8)
        hunyuan_video.attention(q, q, q, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


# ---- Open-Sora ----


@pytest.mark.parametrize("qk_norm", [False, True])
def test_open_sora(qk_norm):
    torch.manual_seed(0)
    model = nn.ModuleList([STDiT3Block(temporal=temporal, qk_norm=qk_norm) for temporal in (False, True)])
    x, y, t = torch.randn(2, 12, 16, requires_grad=True), torch.randn(1, 5, 16), torch.randn(2, 96)

    def run(model):
        out = model[1](model[0](x, y, t, None, None, None, 3, 4), y, t, T=3, S=4)
        return out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)

    want = run(model)
    report = open_sora.swap_in(model)
    assert names(report) == ["0", "1"] and not report.left
    before = attention_calls()
    for ours, host in zip(run(model), want):
        if host is not None:
            close(ours, host, 1e-3)
    assert attention_calls() > before
    close(run(pickle.loads(pickle.dumps(model)))[0], want[0], 1e-3)
    open_sora.swap_out(model)
    assert all(type(block) is STDiT3Block for block in model)
    assert torch.equal(run(model)[0], want[0])


def test_open_sora_leaves_what_it_does_not_know():
    block = STDiT3Block()
    block.attn.attn_drop.p = 0.1
    with pytest.warns(UserWarning, match="nothing is served"):
        report = open_sora.swap_in(block)
    (entry,) = report.left
    assert not report.served and entry == Entry(
        "STDiT3Block", "STDiT3Block", "its attention is causal or drops out probabilities"
    )
