"""Stand-ins for what adapters touch in hosts that are not installed here, with the hosts' documented signatures."""

import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn


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


def attention(
    q,
    k,
    v,
    mode="flash",
    drop_rate=0,
    attn_mask=None,
    causal=False,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_seqlen_q=None,
    max_seqlen_kv=None,
    batch_size=1,
):
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
