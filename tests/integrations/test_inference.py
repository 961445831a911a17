"""Temporal blocks without gradients: some tokens at a time, the same result, and the host's way where anyone looks."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from host_runs import MODELS, as_host, exact, run
from situations import SITUATIONS

from vdcore.integrations.diffusers import inference, swap_in
from vdcore.testing import error_ratio
from vdcore_bench.suites.models import hosts
from vdcore_bench.suites.models.host_blocks import BLOCKS
from vdcore_bench.suites.models.hosts import HostPoint

FACTORIZED = [name for name, tiny in MODELS.items() if tiny.factorized]
TEMPORAL = [name for name in BLOCKS if name != "Wan 1.3B block"]


@pytest.fixture
def few_tokens(monkeypatch):
    """Blocks of tiny clips take a few tokens at a time; ``runs`` says what they did."""
    runs = []

    def noted(x, count, attentions, stages):
        runs.append(inference.pieces(x, count)[1])
        return real(x, count, attentions, stages)

    real = inference.run
    monkeypatch.setattr(inference, "LEAST_TOKENS", 4)
    monkeypatch.setattr(inference, "CACHE_BYTES", 0)
    monkeypatch.setattr(inference, "run", noted)
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FACTORIZED)
def test_models_are_the_hosts(name, dtype, few_tokens):
    model = MODELS[name].model(dtype)
    swap_in(model)
    ratio = error_ratio(run(model, name, dtype), exact(name), [as_host(name, dtype)])
    assert few_tokens and all(len(sizes) > 2 for sizes in few_tokens)
    assert ratio.worst <= 1, ratio


@pytest.mark.parametrize("tokens", [9, 100], ids=["parts of frames", "several frames"])
@pytest.mark.parametrize("name", TEMPORAL)
def test_blocks_of_real_width_are_the_hosts(name, tokens, few_tokens, monkeypatch):
    monkeypatch.setattr(inference, "LEAST_TOKENS", tokens)
    before, after = (HostPoint(name, provider, 5, grid=(7, 5)) for provider in ("diffusers", "vdcore"))
    ratio = error_ratio(after.make().call(), hosts.exact(before), [before.make().call()])
    assert few_tokens
    assert ratio.worst <= 1, ratio


@pytest.mark.parametrize("size", [(2, 3, 8, 5), (1, 4, 1, 3), (3, 1, 64, 2), (2, 5, 6, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 7, 16, 40])
def test_pieces_are_all_tokens_in_order(size, count):
    x = torch.empty(size)
    B, T, S, _ = size
    places, sizes = inference.pieces(x, count)
    of_token = [(b, t) for b in range(B) for t in range(T) for _ in range(S)]
    assert sum(sizes) == len(of_token)
    start = 0
    for place, n in zip(places, sizes, strict=True):
        assert {(place.b, t) for t in range(place.first, place.last + 1)} == set(of_token[start : start + n])
        assert n <= max(count, S if place.last > place.first else 1)
        start += n


def test_hooks_see_what_the_host_gives(few_tokens):
    """A hook inside a block is called once a call, with all tokens in the host's layout."""

    def shapes(model):
        seen = []
        for block in model.temporal_transformer_blocks:
            block.ff.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        run(model, "Latte")
        return seen

    model = MODELS["Latte"].model()
    swap_in(model)
    run(model, "Latte")
    assert few_tokens
    few_tokens.clear()
    assert shapes(model) == shapes(MODELS["Latte"].model())
    assert not few_tokens


@pytest.mark.parametrize("what", ["derived layers", "weights of another class"])
@pytest.mark.parametrize("name", ["Latte", "AnimateDiff", "SVD"])
def test_layers_of_others_are_called(name, what, few_tokens):
    """Whatever they are by now: nothing of a block is taken for what it was when the model was swapped."""
    want = SITUATIONS[what].arrange(MODELS[name].model(), name)()
    model = MODELS[name].model()
    swap_in(model)
    run(model, name)
    assert few_tokens
    few_tokens.clear()
    got = SITUATIONS[what].arrange(model, name)()
    assert not few_tokens
    for ours, host in zip(got, want, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-4, atol=1e-4)


def test_gradients_take_the_other_way(few_tokens):
    model = MODELS["SVD"].model()
    swap_in(model)
    model(**MODELS["SVD"].arguments(torch.float32))
    assert not few_tokens


def test_the_input_of_a_block_stays(few_tokens):
    block = BLOCKS["SVD temporal block"]
    module, given = block.build().eval(), block.inputs(3, 4, 4)
    swap_in(module)
    kept = given[1].clone()
    with torch.no_grad():
        block.ours(module, given)
    assert few_tokens
    assert torch.equal(given[1], kept)


@pytest.mark.parametrize("rows", [3, 40], ids=["a gate on rows", "a gate in weights"])
@pytest.mark.parametrize("kind", ["geglu", "gelu-approximate"])
def test_feed_forward_of_pieces(kind, rows):
    """Pieces of several sizes through the same memory, with and without a gate."""
    torch.manual_seed(0)
    ff = FeedForward(8, inner_dim=20, activation_fn=kind).eval()
    x, gate = torch.randn(rows, 8), torch.randn(8)
    for given in (None, gate):
        with torch.no_grad():
            layer = inference.FeedForwardResidual(ff, rows, inference.Hidden(), given)
            expected, out = x + (1 if given is None else given) * ff(2 * x), torch.empty_like(x)
            for piece, result in zip(x.split([2, rows - 2]), out.split([2, rows - 2])):
                layer.write(piece, 2 * piece, result)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, RMSNorm], ids=["layer", "rms"])
@pytest.mark.parametrize("place", [inference.Piece(0, 1, 1), inference.Piece(0, 1, 3)], ids=["a frame", "frames"])
def test_norm_with_a_shift_of_every_frame(kind, place):
    torch.manual_seed(0)
    norm, scale, shift = kind(8, eps=1e-6), torch.randn(8), torch.randn(5, 8)
    x = torch.randn(place.last - place.first + 1, 6, 8)
    expected = norm(x) * (1 + scale) + shift[place.first : place.last + 1, None]
    with torch.no_grad():
        result = inference.Norm(norm, scale, shift)(x.flatten(0, 1), place)
    torch.testing.assert_close(result.view(x.shape), expected)


def test_layer_norm_of_pieces():
    """Pieces of several sizes through one norm, with a scale and shift and without."""
    torch.manual_seed(0)
    norm, scale, shift = torch.nn.LayerNorm(20), torch.randn(20), torch.randn(20)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(17, 20)
    with torch.no_grad():
        steps = inference.Norm(norm, scale, shift), inference.Norm(norm)
        expected = norm(x) * (1 + scale) + shift, norm(x)
        for step, right in zip(steps, expected):
            results = [step(piece, inference.Piece(0, 0, 0)) for piece in x.split([1, 9, 7])]
            torch.testing.assert_close(torch.cat(results), right)
