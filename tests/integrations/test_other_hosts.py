"""Adapters of hosts that are not installed here, against stand-ins with the hosts' documented signatures."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vdcore
from vdcore.integrations import comfyui, hunyuan_video, open_sora, wan


def close(ours, host, tolerance=1e-5):
    torch.testing.assert_close(ours, host, rtol=tolerance, atol=tolerance)


def attention_calls():
    return sum(n for (op, _, _), n in vdcore.calls().items() if op.endswith("attention"))


# ---- ComfyUI ----


def wrap_attn(func):
    """What ComfyUI puts around every attention function."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" in kwargs:
            return func(*args, **kwargs)
        options = kwargs.get("transformer_options") or {}
        override = options.get("optimized_attention_override", lambda f, *a, **k: f(*a, **k))
        return override(func, *args, **kwargs, _inside_attn_wrapper=True)

    return wrapper


@wrap_attn
def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Patcher:
    """As much of ComfyUI's model patcher as the adapter touches."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        return Patcher(copy.deepcopy(self.model_options))


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("keys", [6, 9])
def test_comfyui(skip_reshape, skip_output_reshape, keys):
    shape = (2, 3, -1, 8) if skip_reshape else (2, -1, 24)
    q, k, v = (torch.randn([n if s == -1 else s for s in shape]) for n in (6, keys, keys))
    flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    host = optimized_attention(q, k, v, 3, **flags)
    model = Patcher({"transformer_options": {"other": 1}})
    swapped = comfyui.swap_in(model)
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


# ---- Wan and HunyuanVideo: functions of the host, used by name in its modules ----


def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False):
    """As Wan's, one sample at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        n = k.shape[1] if k_lens is None else int(k_lens[b])
        one = F.scaled_dot_product_attention(
            q[b].transpose(0, 1) * (q_scale or 1),
            k[b, :n].transpose(0, 1),
            v[b, :n].transpose(0, 1),
            scale=softmax_scale,
        )
        out[b] = one.transpose(0, 1)
    return out


class WanSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, seq_lens):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return flash_attention(q=q, k=k, v=v, k_lens=seq_lens, softmax_scale=0.3).flatten(2)


def test_wan():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Identity(), nn.ModuleList([WanSelfAttention()]))
    x, lengths = torch.randn(2, 7, 16), torch.tensor([7, 4])
    want = host[1][0](x, lengths)
    model = copy.deepcopy(host)
    assert wan.swap_in(model) == ["1.0"] == wan.swap_in(model)
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


def attention(
    q, k, v, mode="flash", drop_rate=0, attn_mask=None, causal=False,
    cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=None, max_seqlen_kv=None, batch_size=1,
):  # fmt: skip
    """As HunyuanVideo's: packed runs of valid tokens and of padding, each attending to itself."""
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    out = torch.zeros_like(rows[0])
    for begin, end in itertools.pairwise(cu_seqlens_q):
        part = (x[begin:end].transpose(0, 1) for x in rows)
        out[begin:end] = F.scaled_dot_product_attention(*part).transpose(0, 1)
    return out.view(q.shape).flatten(2)


class MMSingleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, bounds):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, batch_size=x.shape[0])


class TokenRefinerBlock(nn.Module):
    """As the refiner of text tokens: the same function under a dense mask."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return attention(q, k, v, mode="torch", attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_hunyuan_video_refines_text_under_a_dense_mask(dtype):
    torch.manual_seed(0)
    block, x = TokenRefinerBlock(), torch.randn(2, 5, 16)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    seen = (valid[:, None, :, None] & valid[:, None, None]) | torch.eye(5, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    q, k, v = (y.transpose(1, 2) for y in block.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    assert hunyuan_video.swap_in(block) == [""]
    close(block(x, mask), want)
    with pytest.raises(NotImplementedError, match="mode flash"):
        hunyuan_video.attention(q, k, v, attn_mask=mask)


def test_hunyuan_video():
    torch.manual_seed(0)
    model, x = nn.ModuleList([MMSingleStreamBlock()]), torch.randn(2, 7, 16)
    bounds = torch.tensor([0, 5, 7, 7 + 7, 14], dtype=torch.int32)  # 5 and 7 valid tokens
    want = model[0](x, bounds)
    assert hunyuan_video.swap_in(model) == ["0"]
    ours = model[0](x, bounds)
    close(ours[0, :5], want[0, :5])
    close(ours[1], want[1])
    hunyuan_video.swap_out(model)
    assert torch.equal(model[0](x, bounds), want)
    with pytest.raises(ValueError, match="must hold 3 bounds, got 5"):
        q = torch.randn(1, 7, 2, 8)
        hunyuan_video.attention(q, q, q, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


# ---- Open-Sora ----


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotate(x):
    """Interleaved rotation over the last axis but one, as rotary_embedding_torch has it."""
    n, d = x.shape[-2:]
    angle = (torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)).repeat_interleave(2, -1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angle.cos() + torch.stack((-b, a), -1).flatten(-2) * angle.sin()


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm, rope):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (RMSNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope = rope is not None
        if rope is not None:
            self.rotary_emb = rope

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, mask):
        return self.proj(x) * y.mean()


class STDiT3Block(nn.Module):
    def __init__(self, dim=16, temporal=False, qk_norm=True):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(dim, 2, qk_norm, rotate if temporal else None)
        self.cross_attn = CrossAttention(dim)
        self.mlp, self.drop_path = nn.Linear(dim, dim), nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim))

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        B, N, C = x.shape
        table = (self.scale_shift_table[None] + t.reshape(B, 6, -1)).chunk(6, 1)
        m = self.norm1(x) * (1 + table[1]) + table[0]
        axes = (0, 2, 1, 3) if self.temporal else (0, 1, 2, 3)
        m = m.view(B, T, S, C).permute(axes)
        m = self.attn(m.reshape(-1, m.shape[2], C)).view(m.shape).permute(axes).reshape(B, N, C)
        x = x + self.drop_path(table[2] * m)
        x = x + self.cross_attn(x, y, mask)
        m = self.mlp(self.norm2(x) * (1 + table[4]) + table[3])
        return x + self.drop_path(table[5] * m)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_open_sora(qk_norm):
    torch.manual_seed(0)
    model = nn.ModuleList([STDiT3Block(temporal=temporal, qk_norm=qk_norm) for temporal in (False, True)])
    x, y, t = torch.randn(2, 12, 16, requires_grad=True), torch.randn(1, 5, 16), torch.randn(2, 96)

    def run(model):
        out = model[1](model[0](x, y, t, None, None, None, 3, 4), y, t, T=3, S=4)
        return out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)

    want = run(model)
    served, left = open_sora.swap_in(model)
    assert served == ["0", "1"] and not left
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
    served, left = open_sora.swap_in(block)
    assert not served and left == {"": "its attention is causal or drops out probabilities"}
