"""Windows in rows and columns on every full-3D model of diffusers: the grid is that of the call at hand."""

import threading

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS, DenseMask, L, T
from situations import sized
from swapping import swapped
from test_diffusers_models import JOINT_TEXT, TEXT_FIRST
from zoo import output

from vdcore import FrameMask, GridMask
from vdcore.integrations.diffusers import swap_in
from vdcore.integrations.diffusers.registry import GRIDS

FULL = [name for name, tiny in MODELS.items() if type(tiny.build()) in GRIDS and name != "SkyReelsV2 causal"]
PACKED = ("LTX", "LTX2", "LTX2.3")  # models that get tokens instead of latents
SIZE = {"H": 8, "W": 12}
MASKS = {
    "window": GridMask.window(1, 0, 1, 2),
    "shift": GridMask.neighborhood((3, 3, 5)),
    "tiles": GridMask.tiles((1, 1, 3), (2, 3, 2)),
    "causal": GridMask(FrameMask.causal(), rows=(9, 1), columns=(2, 1)),
    "heads": ((1, GridMask(rows=1)), (1, FrameMask.symmetric(0))),
}


def grid_of(name, H=SIZE["H"], W=SIZE["W"], frames=T):
    patch = 1 if name in PACKED else 2
    return frames, H // patch, W // patch


def call(model, arguments):
    with torch.no_grad():
        return output(model(**arguments))


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("mask", some_slow(MASKS, ("tiles", "heads")))
@pytest.mark.parametrize("name", FULL)
def test_a_mask_equals_the_dense_one(name, mask):
    mask = MASKS[mask]
    with sized(**SIZE):
        arguments, grid = MODELS[name].arguments(), grid_of(name)
        sees = "text" if isinstance(mask, GridMask) and mask.frames.future == 0 else "all"
        model = MODELS[name].model()
        plain = call(model, arguments)
        tokens = grid[0] * grid[1] * grid[2]
        with DenseMask(mask, tokens, JOINT_TEXT.get(name, L), name in TEXT_FIRST, sees, grid) as dense:
            host = call(model, arguments)
        assert dense.hits and not torch.allclose(host, plain, rtol=1e-3, atol=1e-3)
        swap_in(model, mask=mask)
        torch.testing.assert_close(call(model, arguments), host, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in FULL if name not in ("LTX2", "LTX2.3")])
def test_what_a_token_does_not_see_does_not_reach_it(name):
    """One place of one frame changes: nothing else does but this place in this frame and in later ones.

    That is in pixels, so that rows and columns cannot be taken for one another. LTX-2 is left out: its sound sees all.
    """
    with sized(**SIZE):
        arguments, (_, rows, columns) = MODELS[name].arguments(), grid_of(name)
        model, _ = swapped(name, mask=GridMask(FrameMask.causal(), rows=0, columns=0))
        before, (t, y, x) = call(model, arguments), (1, rows - 2, columns - 3)
        changed = arguments["hidden_states"].clone()
        axes = GRIDS[type(MODELS[name].build())]
        if axes is None:
            changed.unflatten(1, (T, rows, columns))[:, t, y, x] += 1
        else:
            _at(changed, axes, t, y, x, 2).add_(1)
        after = call(model, {**arguments, "hidden_states": changed})
        apart = (after - before).abs()
        if axes is None:
            apart, axes, patch = apart.unflatten(1, (T, rows, columns)), (1, 2, 3), 1
        else:
            patch = 2
        assert (_at(apart, axes, t, y, x, patch).amax() > 1e-6) and (_at(apart, axes, t + 1, y, x, patch).amax() > 1e-6)
        for frame in range(t, T):
            _at(apart, axes, frame, y, x, patch).zero_()
        assert apart.amax() <= 1e-6


def _at(video, axes, t, y, x, patch):
    """The view of one token's latents."""
    for axis, start, size in zip(axes, (t, y * patch, x * patch), (1, patch, patch)):
        video = video.narrow(axis, start, size)
    return video


# Of as many tokens, in other frames, rows and columns.
SIZES = ({"H": 8, "W": 12}, {"H": 12, "W": 8}, {"T": 4, "H": 6, "W": 12}, {"T": 2, "H": 12, "W": 12})


@pytest.mark.parametrize("name", some_slow(("Wan", "Mochi", "LTX", "HunyuanVideo"), ("Wan",)))
def test_resolutions_of_one_length_share_no_mask(name):
    """In one process, by turns and in threads at once: each has the bits that it has alone."""
    mask, given, want = GridMask.window(1, 1, 1, 1), [], []
    for sizes in SIZES:
        with sized(**sizes):
            given.append(MODELS[name].arguments())
        want.append(call(swapped(name, mask=mask)[0], given[-1]))
    model, _ = swapped(name, mask=mask)
    for i in (0, 1, 2, 3, 2, 1, 0, 3):
        assert torch.equal(call(model, given[i]), want[i])
    wrong = []

    def calls(i):
        for _ in range(5):
            try:
                if not torch.equal(call(model, given[i]), want[i]):
                    wrong.append(f"{SIZES[i]}: other bits")
            except Exception as error:
                wrong.append(f"{SIZES[i]}: {error}")

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(len(SIZES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_gradients_under_a_window():
    """The host's under the dense mask, with checkpointing of two grids of one length before either backward."""
    mask = GridMask.window(1, 0, 1, 2)

    def loss(model, sizes):
        with sized(**sizes):
            arguments = MODELS["Wan"].arguments()
        x = arguments["hidden_states"].requires_grad_()
        return (output(model(**arguments)) ** 2).sum(), x

    want = []
    for sizes in SIZES[:2]:
        grid = grid_of("Wan", **sizes)
        with DenseMask(mask, 72, L, grid=grid):
            want.append(torch.autograd.grad(*loss(MODELS["Wan"].model(), sizes))[0])
    model, _ = swapped("Wan", mask=mask)
    for checkpointed in (False, True):
        if checkpointed:
            model.train()
            model.enable_gradient_checkpointing()
        both = [loss(model, sizes) for sizes in SIZES[:2]]
        for (value, x), dx in zip(both, want, strict=True):
            torch.testing.assert_close(torch.autograd.grad(value, x)[0], dx, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_has_a_graph_for_each_grid():
    torch.compiler.reset()
    model, report = swapped("Wan", mask=GridMask.window(1, 0, 1, 2))
    compiled = torch.compile(model, backend="aot_eager")
    for sizes in (*SIZES[:2], SIZES[0]):
        with sized(**sizes):
            arguments = MODELS["Wan"].arguments()
        torch.testing.assert_close(call(compiled, arguments), call(model, arguments), rtol=1e-4, atol=1e-4)
        with report.dense():
            want = call(MODELS["Wan"].model(), arguments)
            torch.testing.assert_close(call(compiled, arguments), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Helios", "mask must be None for HeliosTransformer3DModel, whose frames are not known"),
        ("SanaVideo", "mask must be None for SanaVideoTransformer3DModel, whose frames are not known"),
        ("Latte", "mask must be one FrameMask or None for LatteTransformer3DModel, whose attention .* knows no grid"),
        ("AnimateDiff", "mask must be one FrameMask or None for UNetMotionModel"),
    ],
)
def test_a_grid_that_is_not_known_is_an_error(name, message):
    model = MODELS[name].model()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        swap_in(model, mask=GridMask.window(1, 1, 1, 1))
    assert [type(m) for m in model.modules()] == kinds


def test_packed_tokens_without_a_grid_are_an_error():
    model, _ = swapped("LTX", mask=GridMask.window(1, 1, 1, 1))
    arguments = {name: x for name, x in MODELS["LTX"].arguments().items() if name != "width"}
    with pytest.raises(ValueError, match="num_frames, height and width must be given by name under a mask"):
        call(model, arguments)


def test_a_block_outside_of_its_model_is_an_error():
    model, _ = swapped("Wan", mask=GridMask.window(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match=r"over 18 tokens under GridMask.*, outside of a call of the model"):
        model.blocks[0].attn1(torch.randn(2, 18, 24))


def test_a_pipeline_of_diffusers():
    """Latents of two sizes from one pipeline, its first steps dense."""
    transformer = MODELS["Wan"].model()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.WanPipeline(None, None, None, scheduler, transformer)
    report = swap_in(
        pipeline, mask=GridMask.neighborhood((3, 3, 3)), dense_layers=["transformer.blocks.0"], dense_steps=1
    )
    assert any(entry.name == "transformer.blocks.0.attn1" for entry in report.served)

    def sample(H, W):
        latents = torch.randn(1, 4, 3, H, W, generator=torch.Generator().manual_seed(0))
        texts = torch.ones(1, 5, 16), torch.zeros(1, 5, 16)
        given = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "guidance_scale": 2.0}
        sizes = {"height": 8 * H, "width": 8 * W, "num_frames": 9, "num_inference_steps": 3}
        return pipeline(latents=latents, output_type="latent", **given, **sizes).frames

    first, other, again = sample(8, 12), sample(12, 8), sample(8, 12)
    assert torch.equal(first, again) and other.shape != first.shape
    assert pipeline.scheduler.vdcore_steps.taken == 3
