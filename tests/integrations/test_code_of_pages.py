"""Every block of Python in README and docs/ runs, on small models: what a page says works as it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_ins import MMSingleStreamBlock, Patcher, STDiT3Block, WanSelfAttention
from torch import nn

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if BLOCK.search(page.read_text())
)


def model_and_pipeline():
    diffusers = pytest.importorskip("diffusers")
    from host_runs import MODELS

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

        def __call__(self, prompt, generator):
            given = MODELS["Wan"].arguments()
            noise = torch.randn(given["hidden_states"].shape, generator=generator)
            video = self.transformer(**{**given, "hidden_states": noise}).sample[:, :3].sigmoid()  # (B, C, T, H, W)
            return SimpleNamespace(frames=video.permute(0, 2, 3, 4, 1).numpy())

    model = MODELS["Wan"].model()
    return {"model": model, "pipeline": Pipeline(model), "inputs": MODELS["Wan"].arguments(), "prompt": "a cat"}


def blocks(kind, name, **options):
    return lambda: {"pipeline": SimpleNamespace(**{name: nn.ModuleList([kind(**options)])})}


def one_rank():
    """What stands around the loop of docs/parallel.md, on the one process that runs this test."""
    from vdcore.models import VDiTConfig

    config = VDiTConfig(in_channels=4, width=32, depth=2, heads=2)
    part, target = torch.randn(2, 1, 4, 3, 8, 8)
    return {
        "pipeline": model_and_pipeline()["pipeline"],
        "config": config,
        "part": part,
        "target_part": target,
        "timestep": torch.tensor([0.5]),
        "T": 3,
        "elements_of_the_whole": target.numel(),
    }


def grid_of_tokens():
    q, k, v = torch.randn(3, 1, 2, 30 * 52, 1, 8)
    return {"q": q, "k": k, "v": v, "T": 2, "rows": 6, "columns": 8, **model_and_pipeline()}


# Page -> the names that its blocks take from a user's program.
GIVEN = {
    "README.md": model_and_pipeline,
    "docs/diffusers.md": model_and_pipeline,
    "docs/wan.md": blocks(WanSelfAttention, "model"),
    "docs/hunyuan_video.md": blocks(MMSingleStreamBlock, "transformer"),
    "docs/open_sora.md": lambda: {"model": nn.ModuleList([STDiT3Block(temporal=True)])},
    "docs/comfyui.md": lambda: {"model": Patcher({"transformer_options": {}})},
    "docs/parallel.md": one_rank,
    "docs/sparse.md": grid_of_tokens,
}
# Page -> sizes of the block, and those that a test has time for.
SMALLER = {
    "docs/demo.md": (
        ("width=384, heads=6, depth=12", "width=32, heads=2, depth=2"),
        ("(1, 4, 32, 32), steps=30", "(1, 4, 8, 8), steps=2"),
        ("splice(sampler, 64", "splice(sampler, 14"),
    ),
    "docs/parallel.md": (('"cuda", (8,)', '"cpu", (1,)'),),
}


@pytest.fixture
def one_process(request, tmp_path):
    """A group of one process, for the page that needs one."""
    if request.node.callspec.params["page"] != "docs/parallel.md":
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, one_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a picture
    torch.manual_seed(0)
    names = GIVEN.get(page, dict)()
    for number, code in enumerate(BLOCK.findall((ROOT / page).read_text())):
        for text, small in SMALLER.get(page, ()):
            code = code.replace(text, small)
        exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", SMALLER)
def test_sizes_that_are_replaced_are_there(page):
    for text, _ in SMALLER[page]:
        assert text in (ROOT / page).read_text(), f"{page} has no {text!r} any more"
