"""Running hosts' tiny models: plainly, in float64, and under a dense mask."""

from functools import cache

import torch
import torch.nn.functional as F
from inside import AttentionCalls
from torch.overrides import TorchFunctionMode
from zoo import MODELS, L, T, output

from vdcore import FrameMask
from vdcore_bench.measure.float64 import Float64


def run(model, name, dtype=torch.float32):
    with torch.no_grad():
        return output(model(**MODELS[name].arguments(dtype)))


@cache
def exact(name):
    """The host's own result, every operation in float64."""
    with Float64():
        return run(MODELS[name].model(torch.float64), name, torch.float64)


@cache
def as_host(name, dtype=torch.float32):
    return run(MODELS[name].model(dtype), name, dtype)


def gradients(model, name, dtype=torch.float32):
    """Of a fixed combination of the outputs, by parameter and floating input; None where nothing flows."""
    arguments = MODELS[name].arguments(dtype)
    leaves = dict(model.named_parameters())
    for key, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and "mask" not in key:
            leaves[f"input {key}"] = x.requires_grad_()
    y = output(model(**arguments))
    dy = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype) / 8
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return dict(zip(leaves, found))


@cache
def exact_gradients(name):
    with Float64():
        return gradients(MODELS[name].model(torch.float64), name, torch.float64)


def _queries_and_keys(args, kwargs):
    return [args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key"))]


def _both(given, visible):
    """Two masks at once; the host's is boolean or a bias."""
    if given is None:
        return visible
    return given & visible if given.dtype == torch.bool else given.masked_fill(~visible, -torch.inf)


def visible_tokens(mask, grid):
    """The dense mask that a mask of a swap stands for: ``(N, N)``, with pairs of heads ``(H, N, N)``."""
    T, rows, columns = grid
    if isinstance(mask, tuple):
        return torch.cat([visible_tokens(one, grid).expand(count, -1, -1) for count, one in mask])
    if isinstance(mask, FrameMask):
        return mask.visible(T).repeat_interleave(rows * columns, 0).repeat_interleave(rows * columns, 1)
    return mask.visible(T, rows, columns)


class DenseMask(TorchFunctionMode):
    """Puts the dense mask that a mask stands for on a host's attention among video tokens.

    Which calls those are follows from their lengths: of ``tokens``, of tokens and text, or of ``T`` frames in temporal
    attention; a clip's tokens, its frames and the text are of different numbers in these models.

    Args:
        mask: for all calls, or a list with one for each; None in it: all tokens see one another.
        tokens: video tokens; None: temporal attention alone.
        text: tokens of a text that joins the sequence, at most.
        text_first: where it joins.
        text_sees: "all" or "text", or a list as of masks.
    """

    def __init__(self, mask, tokens, text=0, text_first=False, text_sees="all", grid=None):
        super().__init__()
        self.mask, self.tokens, self.text, self.text_first, self.sees = mask, tokens, text, text_first, text_sees
        self.grid = (T, 1, (tokens or T) // T) if grid is None else grid
        self.hits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            q, k = _queries_and_keys(args, kwargs)
            visible = self.dense(q.shape[-2]) if q.shape[-2] == k.shape[-2] else None
            self.hits += visible is not None
            if visible is not None and not visible.all():
                kwargs["attn_mask"] = _both(kwargs.get("attn_mask"), visible)
        return func(*args, **kwargs)

    def dense(self, n):
        """The mask of the call at hand if it is one over the clip, of a sequence of n."""
        mask, sees = (x[self.hits] if isinstance(x, list) else x for x in (self.mask, self.sees))
        if self.tokens is None:
            return mask.visible(T) if n == T else None
        L = n - self.tokens
        if not 0 <= L <= self.text:
            return None
        if mask is None:
            return torch.ones(n, n, dtype=torch.bool)
        tokens = visible_tokens(mask, self.grid)
        whole = torch.ones(*tokens.shape[:-2], n, n, dtype=torch.bool)
        video = slice(L, n) if self.text_first else slice(0, self.tokens)
        text = slice(0, L) if self.text_first else slice(self.tokens, n)
        whole[..., video, video] = tokens
        if sees == "text":
            whole[..., text, video] = False
        return whole


__all__ = ["MODELS", "AttentionCalls", "DenseMask", "L", "T", "as_host", "exact", "exact_gradients", "gradients", "run"]
