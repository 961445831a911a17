"""After the swap, or before it, a user goes on: every situation of the table on every family, against the host."""

import contextlib
import importlib.util
import threading

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers")

from host_runs import MODELS, gradients, run
from parallel_runs import on_two_processes
from situation_lists import CANNOT, FAMILIES, NOT_SERVED, TOLERANCES
from situations import SITUATIONS, blocks_with_attention, derived, sized
from zoo import output

import vdcore
from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in, swap_out
from vdcore.integrations.diffusers.registry import GRIDS

CASES = [
    (what, name, order)
    for what, situation in SITUATIONS.items()
    for name in (FAMILIES if situation.costly else MODELS)
    for order in situation.orders
    if name not in CANNOT.get(what, ())
]
# A few of every kind, of models that are served in different ways; the others are in the slow tier.
CORE = {
    ("first block cache", "Wan"),
    ("pyramid attention broadcast", "Latte"),
    ("guidance by skipped scores", "Latte"),
    ("smoothed energy guidance", "CogVideoX"),
    ("an IP-Adapter", "AnimateDiff"),
    ("FreeNoise", "AnimateDiff"),
    ("weights of another class", "SVD"),
    ("group offloading of leaves", "HunyuanVideo"),
    ("two hooks, removed", "LTX"),
    ("inference mode", "Kandinsky5"),
    ("a function mode", "Mochi"),
    ("an empty text", "Mochi"),
    ("a text with holes", "Mochi"),
    ("gradient checkpointing", "Wan"),
    ("made from its configuration", "SVD"),
    ("a hook of all modules", "Latte"),
    ("a block used twice", "Latte"),
    ("attention that blocks share", "CogVideoX"),
    ("parametrized weights", "Wan"),
}


def needs(situation):
    for package in situation.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def attention_calls():
    return sum(n for (op, _, way), n in vdcore.calls().items() if op.endswith("attention") and way == "fwd")


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mark(what, name, order):
    is_core = (what, name) in CORE and order == "after"
    return pytest.param(what, name, order, marks=() if is_core else pytest.mark.slow)


@pytest.mark.parametrize("what, name, order", [mark(*case) for case in CASES])
def test_situation(what, name, order, one_process):
    situation = SITUATIONS[what]
    needs(situation)
    want = situation.arrange(MODELS[name].model(), name)()
    model = MODELS[name].model()
    if order == "after":
        swap_in(model)
    call = situation.arrange(model, name)
    if order == "before":
        swap_in(model)
    before = attention_calls()
    got = call()
    assert (attention_calls() == before) == (name in NOT_SERVED.get((what, order), ()))
    tolerance = TOLERANCES.get((what, name), 1e-4)
    for ours, host in zip(got, want, strict=True):
        torch.testing.assert_close(ours, host, rtol=tolerance, atol=tolerance)
    if situation.out:
        swap_out(model)
        before = vdcore.calls().total()
        again = call()
        assert vdcore.calls().total() == before
        assert all(torch.equal(ours, host) for ours, host in zip(again, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("what", CANNOT)
def test_what_the_host_cannot_do(what, one_process):
    """The cases that the table leaves out: the host fails alone, or its result is not a number."""
    situation = SITUATIONS[what]
    needs(situation)
    for name in CANNOT[what]:
        out = None
        with contextlib.suppress(Exception):
            out = situation.arrange(MODELS[name].model(), name)()
        assert out is None or not all(x.isfinite().all() for x in out), f"{name} can do it"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["after", "before"])
def test_context_parallelism(order):
    want = run(MODELS["Wan"].model(), "Wan")
    for host, ours in zip(on_two_processes("Wan"), on_two_processes("Wan", order), strict=True):
        torch.testing.assert_close(host, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


# ---- Under a mask, which hosts do not have ----

MASKED = ("Latte", "AnimateDiff", "SVD", "Wan", "LTX", "CogVideoX", "Mochi", "HunyuanVideo")
# Of as many tokens, with other frames.
SIZES = {"three frames": {"T": 3, "H": 4, "W": 6}, "two frames": {"T": 2, "H": 6, "W": 6}}


@pytest.mark.parametrize("name", ["Wan", pytest.param("Mochi", marks=pytest.mark.slow)])
def test_threads_with_other_grids_under_a_mask(name):
    """Two threads share a swapped model: 200 calls each have the bits that they have alone."""
    model = MODELS[name].model()
    swap_in(model, FrameMask.causal())
    given, want, wrong = {}, {}, []
    for size, sizes in SIZES.items():
        with sized(**sizes):
            given[size] = MODELS[name].arguments()
        with torch.no_grad():
            want[size] = output(model(**given[size]))
    assert want["three frames"].shape != want["two frames"].shape

    def calls(size):
        with torch.no_grad():
            for _ in range(200):
                try:
                    if not torch.equal(output(model(**given[size])), want[size]):
                        wrong.append(f"{size}: other bits")
                except Exception as error:
                    wrong.append(f"{size}: {error}")

    threads = [threading.Thread(target=calls, args=(size,)) for size in SIZES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan", "Mochi", "HunyuanVideo", "CogVideoX"])
def test_checkpointing_of_two_clips_before_either_backward(name):
    """Both of as many tokens: each block runs again with the frames of its own clip."""

    def loss_of(model, sizes):
        with sized(**sizes):
            given = MODELS[name].arguments()
        x = given["hidden_states"].requires_grad_()
        return (output(model(**given)) ** 2).sum(), x

    def masked():
        model = MODELS[name].model()
        swap_in(model, FrameMask.causal())
        return model

    model = masked()
    want = [torch.autograd.grad(*loss_of(model, sizes))[0] for sizes in SIZES.values()]
    model = masked().train()
    model.enable_gradient_checkpointing()
    both = [loss_of(model, sizes) for sizes in SIZES.values()]
    for (loss, x), dx in zip(both, want, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], dx, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a hook that does nothing", "group offloading of leaves", "layerwise float8"])
@pytest.mark.parametrize("name", MASKED)
def test_the_mask_holds_whatever_is_inside(name, what):
    """The result under a mask is the same as without, or the call says that it cannot be masked."""
    needs(SITUATIONS[what])
    inside = SITUATIONS[what].arrange
    model = MODELS[name].model()
    swap_in(model, FrameMask.causal())
    if what == "layerwise float8":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
    want = run_tensor(model, name)
    unmasked = run_tensor(MODELS[name].model(), name)
    assert not torch.allclose(want, unmasked, rtol=1e-3, atol=1e-3)
    call = inside(model, name)
    try:
        (got,) = call()
    except RuntimeError as error:
        assert "cannot run under FrameMask" in str(error), error
        assert name in ("CogVideoX", "HunyuanVideo", "Mochi") and "hook" in what
        return
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_derived_before_the_swap_is_left_and_refuses_a_mask(name):
    model = MODELS[name].model()
    is_whole = type(model) in GRIDS or name == "Latte"
    for module in [model] if is_whole else blocks_with_temporal_attention(model):
        module.__class__ = derived(module)
    want = run_tensor(model, name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"with a forward of its own|block is a Derived|frames are not known"):
        swap_in(model, FrameMask.causal())
    assert [type(module) for module in model.modules()] == before
    swap_in(model)
    torch.testing.assert_close(run_tensor(model, name), want, rtol=1e-4, atol=1e-4)


def blocks_with_temporal_attention(model):
    return [m for m in blocks_with_attention(model) if "temporal" in type(m).__name__.lower() or m in motion(model)]


def motion(model):
    return [m for n, m in model.named_modules() if "motion_modules" in n]


def run_tensor(model, name):
    with torch.no_grad():
        out = model(**MODELS[name].arguments(), return_dict=False)
    return out[0]


# ---- Graphs ----

WIDTHS = (6, 10, 14)


def graphs(model, name):
    """Graphs that torch.compile makes for calls of three widths, each twice."""
    torch.compiler.reset()
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for width in WIDTHS:
        with sized(W=width):
            for _ in range(2):
                run(compiled, name)
    return len(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_more_graphs_than_the_host(name):
    model = MODELS[name].model()
    host = graphs(model, name)
    swap_in(model)
    assert graphs(model, name) <= host


# Models with a list of blocks that one piece of code is for, and which take one sample.
LISTED = (
    "Wan",
    "SkyReelsV2",
    "SkyReelsV2 causal",
    "Helios",
    "LTX",
    "LTX2",
    "Cosmos",
    "Kandinsky5",
    "SanaVideo",
    "Latte",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LISTED, "Allegro", "CogVideoX", "EasyAnimate", "HunyuanVideo", "MotifVideo"])
def test_blocks_of_one_sample_are_compiled_once(name):
    """Strides of a batch of one, which mean nothing, are guarded: they are the same for every block, as the host's."""

    def compiled(model):
        torch.compiler.reset()
        made = []

        def backend(graph, _):
            made.append(graph)
            return graph.forward

        for block in next(m for n, m in model.named_modules() if n.endswith(("transformer_blocks", "blocks"))):
            block.compile(backend=backend, fullgraph=True)
        given = MODELS[name].arguments()
        samples = {key: x[:1] if isinstance(x, torch.Tensor) and x.shape[:1] == (2,) else x for key, x in given.items()}
        with torch.no_grad():
            for _ in range(2):
                model(**samples)
        return len(made)

    host = compiled(MODELS[name].model())
    model = MODELS[name].model()
    swap_in(model)
    assert 1 <= compiled(model) <= host


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo"])
def test_gradients_after_all_of_it(name):
    """In and out again, with hooks added and removed on the way: the gradients are the host's bits."""
    model = MODELS[name].model()
    want = gradients(model, name)
    swap_in(model)
    SITUATIONS["two hooks, removed"].arrange(model, name)
    swap_out(model)
    got = gradients(model, name)
    assert all(dx is None or torch.equal(got[key], dx) for key, dx in want.items())
