"""Masks of a swap: of layers and heads, in the first steps of a pipeline, and what is refused by name."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS, DenseMask, L, T, as_host, run
from swapping import state, swapped
from torch import nn

from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in, swap_out

WINDOW, CAUSAL = FrameMask.symmetric(1), FrameMask.causal()
# Models without a text in the sequence, with it last, and with it first: where their blocks are.
PLACES = {
    "Wan": ("blocks", False),
    "HunyuanVideo": ("transformer_blocks", False),
    "CogVideoX": ("transformer_blocks", True),
}


def dense_run(name, masks, sees="all"):
    """The host's own result, with the dense masks of its layers put on."""
    with DenseMask(masks, T * 6, L, PLACES[name][1], sees) as dense:
        want = run(MODELS[name].model(), name)
    assert dense.hits == len(masks)
    return want


def same(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


# ---- Layers ----


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("by", ["number", "name"])
def test_dense_layers_see_everything(name, by):
    count = 4 if name == "HunyuanVideo" else 2
    layer = 1 if by == "number" else f"{PLACES[name][0]}.1"
    model, _ = swapped(name, mask=WINDOW, dense_layers=[layer])
    want = dense_run(name, [None if i == 1 else WINDOW for i in range(count)])
    same(run(model, name), want)
    assert not torch.allclose(want, run(swapped(name, mask=WINDOW)[0], name), rtol=1e-3, atol=1e-3)
    swap_out(model)
    assert torch.equal(run(model, name), as_host(name))


def test_layers_are_counted_in_forward_order():
    """Of a model with two kinds of blocks, and of a U-Net, which registers its stages in another order."""
    masks = [None, WINDOW, None, WINDOW]
    model, _ = swapped("HunyuanVideo", mask=WINDOW, dense_layers=(0, 2))
    same(run(model, "HunyuanVideo"), dense_run("HunyuanVideo", masks))
    names = ["transformer_blocks.0", "single_transformer_blocks.0"]
    model, _ = swapped("HunyuanVideo", mask=WINDOW, dense_layers=names)
    same(run(model, "HunyuanVideo"), dense_run("HunyuanVideo", masks))


@pytest.mark.parametrize("name", ["AnimateDiff", "SVD", "UNet3D", "I2VGenXL"])
def test_layers_of_a_unet_are_in_forward_order(name):
    model = MODELS[name].model()
    with pytest.raises(ValueError, match=r"dense_layers must be among .*, got 'nowhere'") as error:
        swap_in(model, mask=WINDOW, dense_layers=["nowhere"])
    known = [
        entry.partition(": ")[2] for entry in str(error.value).partition("among ")[2].split(", got")[0].split(", ")
    ]
    seen = []
    for path in known:
        first = next(m for _, m in model.get_submodule(path).named_modules() if hasattr(m, "to_q"))
        first.register_forward_pre_hook(lambda module, args, path=path: seen.append(path))
    run(model, name)
    assert list(dict.fromkeys(seen)) == known


def test_a_part_of_a_model_is_all_its_layers():
    model, _ = swapped("HunyuanVideo", mask=WINDOW, dense_layers=["single_transformer_blocks"])
    same(run(model, "HunyuanVideo"), dense_run("HunyuanVideo", [WINDOW, WINDOW, None, None]))


def test_layers_with_masks_of_their_own():
    model, _ = swapped("HunyuanVideo", mask={0: WINDOW, "single_transformer_blocks": CAUSAL, 3: None})
    # Text must not carry the future into the past where the mask of a layer is causal, and may elsewhere.
    want = dense_run("HunyuanVideo", [WINDOW, None, CAUSAL, None], ["all", "all", "text", "all"])
    same(run(model, "HunyuanVideo"), want)


def test_masks_of_heads():
    name = "Wan"
    pairs = ((1, WINDOW), (1, CAUSAL))
    model, _ = swapped(name, mask=pairs)
    same(run(model, name), dense_run(name, [pairs, pairs]))


# ---- In force or not ----


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "Latte"])
def test_inside_of_dense_all_is_as_the_host_does_it(name):
    model, report = swapped(name, mask=CAUSAL)
    masked = run(model, name)
    assert not torch.allclose(masked, as_host(name), rtol=1e-3, atol=1e-3)
    with report.dense():
        same(run(model, name), as_host(name))
        with report.dense():
            pass
        same(run(model, name), as_host(name))
    assert torch.equal(run(model, name), masked)


def test_dense_is_of_its_own_models_and_thread():
    import threading

    model, report = swapped("Wan", mask=CAUSAL)
    other, _ = swapped("Wan", mask=CAUSAL)
    want, found = run(other, "Wan"), []
    with report.dense():
        assert torch.equal(run(other, "Wan"), want)
        thread = threading.Thread(target=lambda: found.append(run(model, "Wan")))
        thread.start()
        thread.join()
    assert torch.equal(found[0], want)


def test_checkpointed_blocks_run_again_as_they_ran():
    """Backward comes after the block of dense() is over."""
    model, report = swapped("Wan", mask=CAUSAL)
    arguments = MODELS["Wan"].arguments()
    x = arguments["hidden_states"].requires_grad_()

    def gradient():
        with report.dense():
            loss = (model(**arguments).sample ** 2).sum()
        return torch.autograd.grad(loss, x)[0]

    want = gradient()
    model.train()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_has_a_graph_for_each():
    torch.compiler.reset()
    model, report = swapped("Wan", mask=CAUSAL)
    compiled = torch.compile(model, backend="aot_eager")
    masked = run(model, "Wan")
    same(run(compiled, "Wan"), masked)
    with report.dense():
        same(run(compiled, "Wan"), as_host("Wan"))
    same(run(compiled, "Wan"), masked)


# ---- Steps of a pipeline ----


class Pipeline:
    """What a pipeline is to the swap: components, one of which is its scheduler."""

    def __init__(self, scheduler=None, **models):
        self.scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
        self.models = models

    @property
    def components(self):
        return {"scheduler": self.scheduler, **self.models}

    def __call__(self, steps=4):
        """What the model predicts in every step."""
        self.scheduler.set_timesteps(steps)
        arguments = MODELS["Wan"].arguments()
        found = []
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                found.append(self.models["transformer"](**arguments).sample)
                self.scheduler.step(found[-1], t, arguments["hidden_states"])
        return found


@pytest.mark.parametrize(
    "scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
)
def test_the_first_steps_of_a_pipeline_are_dense(scheduler):
    host = getattr(diffusers, scheduler)()
    pipeline = Pipeline(host, transformer=MODELS["Wan"].model())
    before = dict(host.__dict__)
    swap_in(pipeline, mask=CAUSAL, dense_steps=2)
    assert isinstance(host, getattr(diffusers, scheduler)) and type(host).__name__ == scheduler
    masked = run(swapped("Wan", mask=CAUSAL)[0], "Wan")
    for _ in range(2):  # each clip counts from its own set_timesteps
        for i, got in enumerate(pipeline()):
            same(got, as_host("Wan") if i < 2 else masked)
    swap_out(pipeline)
    assert type(host) is getattr(diffusers, scheduler) and set(host.__dict__) == set(before) | set(host.__dict__)
    assert "vdcore_steps" not in host.__dict__
    assert all(torch.equal(got, as_host("Wan")) for got in pipeline())


def test_copies_of_a_scheduler_count_for_themselves():
    """Pipelines of sound and picture step a copy of the scheduler beside it."""
    pipeline = Pipeline(transformer=MODELS["Wan"].model())
    swap_in(pipeline, mask=CAUSAL, dense_steps=1)
    for other in (copy.deepcopy(pipeline.scheduler), pickle.loads(pickle.dumps(pipeline.scheduler))):
        other.set_timesteps(4)
        other.step(torch.zeros(1), other.timesteps[0], torch.zeros(1))
        assert other.vdcore_steps.taken == 1 and pipeline.scheduler.vdcore_steps.taken == 0
    copied = copy.deepcopy(pipeline)
    for i, got in enumerate(copied()):
        masked = run(swapped("Wan", mask=CAUSAL)[0], "Wan")
        same(got, as_host("Wan") if i < 1 else masked)


def test_a_replaced_scheduler_is_noticed():
    pipeline = Pipeline(transformer=MODELS["Wan"].model())
    swap_in(pipeline, mask=CAUSAL, dense_steps=2)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(RuntimeError, match="scheduler was replaced since the swap"):
        pipeline()
    swap_in(pipeline, mask=CAUSAL, dense_steps=2)
    same(pipeline()[0], as_host("Wan"))


# ---- What is refused ----


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"mask": "causal"}, TypeError, r"swap_in: mask must be a FrameMask.*, got str"),
        ({"mask": ((1, "causal"),)}, TypeError, r"swap_in: mask must be .*, got \(1, 'causal'\) in a tuple"),
        ({"mask": ((0, WINDOW), (2, WINDOW))}, ValueError, r"mask must count at least one head in every pair, got 0"),
        ({"mask": ((1, WINDOW),)}, ValueError, r"mask must count the 2 heads of blocks\.0\.attn\d, got 1 in 1 pairs"),
        ({"mask": {7: WINDOW}}, ValueError, r"mask must be among 0: blocks\.0, 1: blocks\.1, got 7"),
        ({"mask": {0.5: WINDOW}}, TypeError, r"swap_in: mask must be .*, got 0.5 of a layer"),
        ({"mask": WINDOW, "dense_layers": [2]}, ValueError, r"dense_layers must be among 0: blocks\.0, 1: .*, got 2"),
        ({"mask": WINDOW, "dense_layers": [-1]}, ValueError, r"dense_layers must be among .*, got -1"),
        ({"mask": WINDOW, "dense_layers": ["blocks.9"]}, ValueError, r"dense_layers must be among .*, got 'blocks\.9'"),
        (
            {"mask": WINDOW, "dense_layers": [1.0]},
            TypeError,
            r"dense_layers must name layers by number or name, got 1.0",
        ),
        (
            {"mask": WINDOW, "dense_steps": 2},
            ValueError,
            r"dense_steps must be 0 for a model, .*with report\.dense\(\)",
        ),
        ({"mask": WINDOW, "dense_steps": -1}, ValueError, r"dense_steps must be at least 0, got -1"),
        ({"mask": WINDOW, "dense_steps": "2"}, TypeError, r"dense_steps must be an int, got '2'"),
        ({"dense_layers": [0]}, ValueError, r"dense_layers must come with a mask"),
    ],
    ids=lambda x: str(x)[:50] if isinstance(x, dict) else "",
)
def test_what_is_refused_changes_nothing(given, error, message):
    for first in (lambda model: None, lambda model: swap_in(model, WINDOW, [1])):
        model = MODELS["Wan"].model()
        first(model)
        before, want = state(model), run(model, "Wan")
        with pytest.raises(error, match=message):
            swap_in(model, **given)
        assert [kind for kind, *_ in state(model)] == [kind for kind, *_ in before]
        assert torch.equal(run(model, "Wan"), want)


def test_a_pipeline_without_steps_is_refused():
    pipeline = Pipeline(nn.Identity(), transformer=MODELS["Wan"].model())
    with pytest.raises(
        ValueError, match=r"dense_steps must be 0 for Pipeline, which has no scheduler with steps, got 2"
    ):
        swap_in(pipeline, mask=WINDOW, dense_steps=2)


def test_models_of_a_pipeline_may_have_layers_of_their_own():
    pipeline = Pipeline(transformer=MODELS["Wan"].model(), transformer_2=MODELS["Wan"].model())
    swap_in(pipeline, mask=WINDOW, dense_layers=["transformer_2.blocks.0"])
    want = run(swapped("Wan", mask=WINDOW, dense_layers=[0])[0], "Wan")
    assert torch.equal(run(pipeline.models["transformer_2"], "Wan"), want)
    want = run(swapped("Wan", mask=WINDOW)[0], "Wan")
    assert torch.equal(run(pipeline.models["transformer"], "Wan"), want)


def test_other_settings_replace_the_first():
    model, _ = swapped("Wan", mask=WINDOW)
    want = run(swapped("Wan", mask=WINDOW, dense_layers=[0])[0], "Wan")
    assert not torch.equal(run(model, "Wan"), want)
    for _ in range(2):
        swap_in(model, mask=WINDOW, dense_layers=[0])
        assert torch.equal(run(model, "Wan"), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, "Wan"), want)
