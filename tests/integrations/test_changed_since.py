"""What people change around a swap: a mask is never lost to it, and what they put in runs as they wrote it."""

import copy
import functools
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")

from diffusers.models.transformers import transformer_wan
from host_runs import MODELS, as_host, run
from stand_ins import STDiT3Block
from support import run_python
from swapping import swapped

import vdcore
from vdcore import FrameMask
from vdcore.integrations import open_sora, wan
from vdcore.integrations.diffusers import swap_in, swap_out
from vdcore.integrations.diffusers.clip import Clip

CAUSAL = FrameMask.causal()


def replace_processors(model):
    for block in model.blocks:
        block.attn1.processor = transformer_wan.WanAttnProcessor()


def replace_blocks(model):
    model.blocks = MODELS["Wan"].model().blocks


@pytest.mark.parametrize("change", [replace_processors, replace_blocks])
def test_a_mask_is_not_lost_to_what_was_replaced(change):
    model, _ = swapped("Wan", mask=CAUSAL)
    want = run(model, "Wan")
    change(model)
    with pytest.raises(RuntimeError, match=r"replaced since the swap, .*swap in again"):
        run(model, "Wan")
    swap_in(model, mask=CAUSAL)
    torch.testing.assert_close(run(model, "Wan"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Wan", "Latte", "SVD"])
def test_parts_that_were_swapped_on_their_own_get_the_mask(name):
    want = run(swapped(name, mask=CAUSAL)[0], name)
    model = MODELS[name].model()
    for part in [m for n, m in model.named_modules() if n.endswith("blocks.0")]:
        swap_in(part)
    swap_in(model, mask=CAUSAL)
    assert torch.equal(run(model, name), want)
    swap_out(model)
    assert torch.equal(run(model, name), as_host(name))


def test_a_block_that_was_copied_is_named_and_then_swapped():
    """A copy belongs to a copy of its model."""
    model, _ = swapped("Wan", mask=CAUSAL)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    with pytest.raises(RuntimeError, match="swap in again"):
        run(model, "Wan")
    swap_in(model, mask=CAUSAL)
    other = MODELS["Wan"].model()
    other.blocks[1] = copy.deepcopy(other.blocks[0])
    swap_in(other, mask=CAUSAL)
    assert torch.equal(run(model, "Wan"), run(other, "Wan"))


@pytest.mark.parametrize("name", ["Latte", "Wan"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_mask_is_not_lost_to_one_processor_for_all(name, which):
    """Each processor was made for its place: one of temporal attention would restrict tokens of a frame."""
    model, _ = swapped(name, mask=CAUSAL)
    want = run(model, name)
    attentions = [module for module in model.modules() if hasattr(module, "processor")]
    for attn in attentions:
        attn.processor = attentions[which].processor
    with pytest.raises(RuntimeError, match=r"replaced since the swap, .*swap in again"):
        run(model, name)
    swap_in(model, mask=CAUSAL)
    assert torch.equal(run(model, name), want)


@pytest.mark.parametrize("name", ["Latte", "Mochi"])
def test_a_processor_that_someone_kept_is_the_hosts_after_the_swap(name):
    """Under a mask as well, and again ours once the model is swapped in again."""
    host, model = MODELS[name].model(), swapped(name, mask=CAUSAL)[0]
    module = next(m for m in model.modules() if hasattr(m, "processor"))
    kept, of_host = module.processor, next(m for m in host.modules() if hasattr(m, "processor")).processor
    swap_out(model)
    module.processor = kept
    calls = vdcore.calls().total()
    assert torch.equal(run(model, name), run(host, name))
    assert vdcore.calls().total() == calls and isinstance(kept.host, type(of_host))


def test_a_class_that_was_changed_stays_changed():
    """What someone puts on the class of a swapped model is the host's, also when it is swapped out and put back."""
    model, _ = swapped("Latte")
    served, ours, original = type(model), type(model).forward, type(model).host.forward
    want, of_host = run(model, "Latte"), as_host("Latte")
    try:
        served.forward = lambda self, **given: (2 * ours(self, **given).sample,)
        assert torch.equal(run(model, "Latte"), 2 * want)
        swap_out(model)
        assert torch.equal(run(model, "Latte"), 2 * of_host)
        swap_in(model)
        torch.testing.assert_close(run(model, "Latte"), 2 * want, rtol=1e-4, atol=1e-4)
    finally:
        served.forward = ours
    assert served.host.forward is original
    swap_out(model)
    swap_in(model)
    assert torch.equal(run(model, "Latte"), want)


def test_a_mask_of_keys_is_looked_at_by_threads_at_once():
    """Masks of as many keys, of calls that end while others look: each thread has the lengths of its own."""
    clip, wrong = Clip(None), []
    interval = sys.getswitchinterval()

    def request(valid):
        for _ in range(100):
            for mask in [torch.arange(8)[None] < valid for _ in range(20)]:
                try:
                    if clip.valid_keys(mask).lengths.tolist() != [valid]:
                        wrong.append(f"other lengths than {valid}")
                except Exception as error:
                    wrong.append(str(error))

    threads = [threading.Thread(target=request, args=(valid,)) for valid in (1, 2, 3, 4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


def test_a_mask_is_not_lost_to_fused_projections():
    model, _ = swapped("CogVideoX", mask=CAUSAL)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="swap in again"):
        run(model, "CogVideoX")


def test_forward_itself_tells_no_frames():
    model, _ = swapped("Wan", mask=CAUSAL)
    run(model, "Wan")
    with pytest.raises(RuntimeError, match=r"not its blocks or its forward\(\)"):
        model.forward(**MODELS["Wan"].arguments())


# ---- Processors of their own ----


def attended(attn, x, context, attention):
    q, k, v = transformer_wan._get_qkv_projections(attn, x, context)
    q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attn.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


class OtherName:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = transformer_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def doubled(function):
    @functools.wraps(function)
    def twice(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return twice


class Decorated:
    @doubled
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return attended(attn, hidden_states, encoder_hidden_states, F.scaled_dot_product_attention)


@dataclass
class Unhashable:
    scale: float = 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = transformer_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("processor", [OtherName, Decorated, Unhashable])
def test_processors_of_others_run_as_they_are(processor):
    models = MODELS["Wan"].model(), MODELS["Wan"].model()
    for model in models:
        for block in model.blocks:
            block.attn1.processor = processor()
    report = swap_in(models[1])
    torch.testing.assert_close(run(models[1], "Wan"), run(models[0], "Wan"), rtol=1e-4, atol=1e-4)
    assert sum("attn1" in entry.name for entry in report.left) == len(models[1].blocks)


@pytest.mark.parametrize("processor", [OtherName, Decorated])
def test_a_mask_is_refused_for_processors_that_would_lose_it(processor):
    model = MODELS["Wan"].model()
    model.blocks[0].attn1.processor = processor()
    with pytest.raises(ValueError, match=r"mask must be None where blocks\.0\.attn1 cannot be served"):
        swap_in(model, mask=CAUSAL)
    assert torch.equal(run(MODELS["Wan"].model(), "Wan"), as_host("Wan"))


# ---- Values, hooks, names ----


def test_a_mask_of_keys_may_be_written_without_a_version():
    host, model = MODELS["Mochi"].model(), swapped("Mochi")[0]
    arguments = MODELS["Mochi"].arguments()
    with torch.no_grad():
        model(**arguments)
        keys = arguments["encoder_attention_mask"]
        keys.data.copy_(torch.arange(keys.shape[1]) < torch.tensor([[2], [4]]))
        torch.testing.assert_close(model(**arguments).sample, host(**arguments).sample, rtol=1e-4, atol=1e-4)


def test_hooks_in_another_process_keep_their_numbers(tmp_path):
    torch.save(swapped("Wan", mask=CAUSAL)[0], tmp_path / "model.pt")
    code = f"""
import torch
from zoo import MODELS
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
seen = []
model.register_forward_pre_hook(lambda module, args: seen.append(1))
model(**MODELS["Wan"].arguments())
print(len(seen))
"""
    assert run_python(code, PYTHONPATH=str(Path(__file__).parent)).strip() == "1"


def test_open_sora_leaves_attention_with_hooks():
    block = STDiT3Block(temporal=True, qk_norm=True).eval()
    given = torch.randn(2, 12, 16), torch.randn(1, 5, 16), torch.randn(2, 96), None, None, None, 3, 4
    with torch.no_grad():
        open_sora.swap_in(nn.ModuleList([block]))
        plain = block(*given)
        block.attn.register_forward_hook(lambda module, args, out: 3 * out)
        hooked = block(*given)
        open_sora.swap_out(block)
        torch.testing.assert_close(hooked, block(*given), rtol=1e-5, atol=1e-5)
        assert not torch.equal(hooked, plain)


def test_an_attribute_named_as_the_hosts_function_is_no_call_of_it():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)

        def forward(self, x):
            return self.attention(x)

    with pytest.warns(UserWarning, match="nothing is served"):
        assert not wan.swap_in(Layer()).served


def scaled(module, args, out):
    return tuple(1.5 * y for y in out) if isinstance(out, tuple) else 1.5 * out


@pytest.mark.parametrize("name, path", [("Wan", "blocks.0.attn1"), ("Latte", "temporal_transformer_blocks.0")])
def test_hooks_are_seen_whenever_they_come(name, path):
    """On every module inside, one after the other; on one that was put there after a call; and gone when removed."""
    host, model = MODELS[name].model(), swapped(name)[0]
    plain = run(model, name)

    def hooked(of, inside):
        module = of.get_submodule(path).get_submodule(inside)
        handle = module.register_forward_hook(scaled)
        out = run(of, name)
        handle.remove()
        return out

    for inside, module in host.get_submodule(path).named_modules():
        if not isinstance(module, nn.Dropout | nn.ModuleList):
            torch.testing.assert_close(hooked(model, inside), hooked(host, inside), rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, name), plain)

    for of in (host, model):
        attn = of.get_submodule(path) if name == "Wan" else of.get_submodule(path).attn1
        layer = nn.Linear(attn.to_q.in_features, attn.to_q.out_features)
        layer.load_state_dict(attn.to_q.state_dict(), strict=False)
        nn.init.zeros_(layer.bias)
        layer.register_forward_hook(scaled)
        attn.to_q = nn.Sequential(layer)
    torch.testing.assert_close(run(model, name), run(host, name), rtol=1e-4, atol=1e-4)


# ---- Inputs that hooks of the model change ----


def with_fewer_frames(module, args, kwargs):
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, :, :2]}


def turned(module, args, kwargs):  # as many tokens, other frames
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].permute(0, 1, 4, 3, 2)}


@pytest.mark.parametrize("change", [with_fewer_frames, turned])
def test_a_hook_that_changes_the_clip_is_named_under_a_mask(change):
    model, _ = swapped("Wan", mask=CAUSAL)
    given = {**MODELS["Wan"].arguments(), "hidden_states": torch.randn(2, 4, 4, 4, 6)}
    with torch.no_grad():
        want = model(**change(model, (), given)[1]).sample
        model.register_forward_pre_hook(change, with_kwargs=True)
        with pytest.raises(RuntimeError, match=r"a hook that was registered after the swap .*swap in again"):
            model(**given)
        swap_in(model, mask=CAUSAL)
        torch.testing.assert_close(model(**given).sample, want)


# ---- report.check ----


def test_check_starts_generators_anew():
    model, report = swapped("Wan")

    def pipeline(generator):
        noise = torch.randn(2, 4, 3, 4, 6, generator=generator)
        return model(**{**MODELS["Wan"].arguments(), "hidden_states": noise})

    assert report.check(pipeline, generator=torch.Generator().manual_seed(0)).largest < 1e-5


def test_check_reads_images_and_nan():
    _, report = swapped("Wan")

    class Image:  # as PIL's
        __array_interface__ = np.zeros((4, 4, 3), np.uint8).__array_interface__

    assert report.check(lambda: [[Image()]]).largest == 0
    calls = []

    def later_nan():
        calls.append(1)
        return torch.ones(2), torch.full((2,), torch.nan if len(calls) > 2 else 0.0)

    assert np.isnan(report.check(later_nan).largest)
    with pytest.raises(TypeError, match="must return tensors, arrays or images, got str"):
        report.check(lambda: "nothing")
    with pytest.raises(ValueError, match="check: model must be swapped in"):
        report.check(MODELS["Wan"].model(), **MODELS["Wan"].arguments())


def test_check_leaves_other_threads_alone():
    """While one thread has the host's turn, calls of another are served."""
    model, report = swapped("Wan")
    served, again, reached = run(model, "Wan"), [], []

    def pipeline():
        reached.append(vdcore.calls().total())
        if len(reached) == 1:  # the host's turn
            other = threading.Thread(target=lambda: again.append(run(model, "Wan")))
            other.start()
            other.join()
            reached.append(vdcore.calls().total())
        return run(model, "Wan")

    report.check(pipeline)
    assert reached[1] > reached[0] and torch.equal(again[0], served)
    assert reached[2] == reached[1]  # the host's, in this thread


# ---- Where the host fails ----


@pytest.mark.parametrize("name", ["Latte", "Allegro", "LTX", "Cosmos"])
def test_calls_that_the_host_refuses_are_refused(name):
    """A text of no tokens, of which some make rows; a mask of a rank that attention does not take."""
    given = MODELS[name].arguments()
    text = given["encoder_hidden_states"]
    if name == "Cosmos":
        given["attention_mask"] = torch.ones(text.shape[0], 1, text.shape[1], dtype=torch.bool)
        given["attention_mask"][..., -1] = False
    else:
        given["encoder_hidden_states"] = text[:, :0]
        if "encoder_attention_mask" in given:
            given["encoder_attention_mask"] = given["encoder_attention_mask"][:, :0]
    errors = []
    for model in (MODELS[name].model(), swapped(name)[0]):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            model(**given)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
