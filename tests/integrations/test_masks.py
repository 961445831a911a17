"""What a mask keeps of a model's attention, measured in a dense pass: against float64 and the dense mask."""

import pytest
import torch

import vdcore
from vdcore import FrameMask, GridMask
from vdcore.integrations.mask_names import FORMS, candidates, parse_mask
from vdcore.integrations.masks import measure_masks
from vdcore.models import VDiT, VDiTConfig

GRID = (4, 4, 6)
MASKS = {"frames": FrameMask.symmetric(1), "window": GridMask.window(1, 1, 1, 2), "radial": GridMask.radial(4, 6)}


def vdit(**given):
    """A VDiT with full attention, whose weights are random all of them, and arguments of its forward."""
    torch.manual_seed(0)
    config = VDiTConfig(width=48, depth=2, heads=4, attention="full", position="rope", qk_norm=True, **given)
    model = VDiT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model, {"video": torch.randn(2, 4, 4, 8, 12), "timestep": torch.tensor([100.0, 600.0])}


def attention_of(model, inputs):
    """q, k, v of every layer as its scores see them, by the layer's name: ``(B, T, S, H, D)``."""
    found = {}

    def look(name):
        def hook(layer, args):
            x, context = args[:2]
            q, k, v = layer.split(layer.qkv(x))
            q, k = vdcore.qk_norm_rope(q, k, norm=layer.norm(), rope=context.rotations.full)
            found[name] = q, k, v

        return hook

    layers = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "FullAttention"]
    handles = [m.register_forward_pre_hook(look(name)) for name, m in layers]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def dense_mask(mask, grid=GRID):
    T, rows, columns = grid
    if isinstance(mask, GridMask):
        return mask.visible(T, rows, columns)
    return mask.visible(T).repeat_interleave(rows * columns, 0).repeat_interleave(rows * columns, 1)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_kept_mass_is_the_oracles(kv_heads):
    """Mass, worst and error by the softmax written down in float64."""
    model, inputs = vdit(kv_heads=kv_heads)
    report = measure_masks(model, inputs, MASKS, rounds=0)
    layers = attention_of(model, inputs)
    assert report.grid == GRID and report.layers == list(layers) and len(report.kept) == 2 * 4 * len(MASKS)
    for kept in report.kept:
        q, k, v = (x.double().flatten(1, 2) for x in layers[kept.layer])
        k, v = (x.repeat_interleave(4 // k.shape[2], 2) for x in (k, v))
        q, k, v = (x[:, :, kept.head] for x in (q, k, v))
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        seen = p * dense_mask(MASKS[kept.mask])
        mass = seen.sum(-1)
        assert kept.density == pytest.approx(float(dense_mask(MASKS[kept.mask]).double().mean()), abs=1e-6)
        assert kept.mass == pytest.approx(float(mass.mean()), abs=1e-5)
        assert kept.worst == pytest.approx(float(mass.flatten().sort().values[-(-mass.numel() // 100) - 1]), abs=1e-5)
        apart = (seen @ v) / mass[..., None] - p @ v
        assert kept.error == pytest.approx(float(apart.norm() / (p @ v).norm()), abs=1e-4)


def test_kept_mass_is_that_of_the_operator():
    model, inputs = vdit()
    report = measure_masks(model, inputs, MASKS, rounds=0)
    for name, (q, k, _) in attention_of(model, inputs).items():
        for which, mask in MASKS.items():
            mass = vdcore.kept_mass(q, k, mask, grid=GRID[1:]).mean((0, 1, 2))
            found = [kept.mass for kept in report.of(which) if kept.layer == name]
            torch.testing.assert_close(torch.tensor(found), mass, rtol=1e-4, atol=1e-5)


def test_some_frames_stand_for_all():
    """Those frames' queries alone, by the same numbers as among all of them."""
    model, inputs = vdit()
    report = measure_masks(model, inputs, MASKS, query_frames=2, rounds=0)
    assert report.query_frames == (1, 3)
    q, k, _ = attention_of(model, inputs)[
        "blocks.0.layers.0" if "blocks.0.layers.0" in report.layers else report.layers[0]
    ]
    for which, mask in MASKS.items():
        mass = vdcore.kept_mass(q, k, mask, grid=GRID[1:])[:, [1, 3]].mean((0, 1, 2))
        found = [kept.mass for kept in report.of(which) if kept.layer == report.layers[0]]
        torch.testing.assert_close(torch.tensor(found), mass, rtol=1e-4, atol=1e-5)


def test_the_cheapest_mask_that_keeps_enough_is_recommended():
    model, inputs = vdit()
    report = measure_masks(model, inputs, MASKS, rounds=0)
    for keep in (0.0, 0.3, 0.6, 0.95, 1.1):
        for layer, names in report.choices(keep).items():
            for head, name in enumerate(names):
                fits = {x.mask: x.density for x in report.kept if (x.layer, x.head) == (layer, head) and x.mass >= keep}
                fits = {mask: density for mask, density in fits.items() if density < 1}
                assert name == (min(fits, key=fits.get) if fits else "dense")
        masks = report.recommended(keep)
        assert set(masks) == set(report.layers)
        for layer, mask in masks.items():
            counts = sum(n for n, _ in mask) if isinstance(mask, tuple) else 4
            assert counts == 4 and (mask is None) == (set(report.choices(keep)[layer]) == {"dense"})
    assert report.saving(1.1) == 1 and report.saving(0.0) < 0.5


def test_times_decide_where_there_are_some():
    model, inputs = vdit()
    report = measure_masks(model, inputs, MASKS, rounds=1)
    assert set(report.seconds) == {(layer, name) for layer in report.layers for name in ("dense", *MASKS)}
    for layer in report.layers:
        report.seconds.update({(layer, "dense"): 1.0, (layer, "frames"): 0.3, (layer, "window"): 2.0})
        report.seconds[layer, "radial"] = 0.6
    assert {name for names in report.choices(0.0).values() for name in names} == {"frames"}
    assert "for 95 % in every head" in str(report) and all(name in str(report) for name in MASKS)
    report = measure_masks(model, inputs, {"all of it": GridMask.window(9, 9, 9, 9)}, rounds=1)
    for layer in report.layers:
        report.seconds.update({(layer, "dense"): 1.0, (layer, "all of it"): 0.5})
    assert {name for names in report.choices(0.0).values() for name in names} == {"dense"}


def test_shared_keys_share_a_mask():
    model, inputs = vdit(kv_heads=2)
    report = measure_masks(model, inputs, MASKS, rounds=0)
    for names in report.choices(0.5).values():
        assert names[0] == names[1] and names[2] == names[3]


@pytest.mark.parametrize("grid", [(4, 8, 8), (8, 22, 40), (21, 30, 52), (1, 3, 5), (13, 1, 7)])
def test_candidates_fit_any_grid(grid):
    names = candidates(grid)
    density = {}
    for name in names:
        mask = parse_mask(name, grid)
        density[name] = mask.density(*grid) if isinstance(mask, GridMask) else mask.density(grid[0])
    assert len(names) == len(set(names)) >= 5 and all(0 < share <= 1 for share in density.values())


@pytest.mark.parametrize(
    "name, mask",
    [
        ("causal", FrameMask.causal()),
        ("frames:2", FrameMask.symmetric(2)),
        ("frames:2/0", FrameMask.window(2)),
        ("frames:all/0", FrameMask.causal()),
        ("window:1/all/2/3", GridMask.window(1, None, 2, 3)),
        ("neighborhood:3/5/7", GridMask.neighborhood((3, 5, 7))),
        ("tiles:3/3/5:1/4/8", GridMask.tiles((3, 3, 5), (1, 4, 8))),
        ("radial", GridMask.radial(4, 6)),
        ("radial:0", GridMask.radial(4, 6, sink=0)),
    ],
)
def test_names_of_masks(name, mask):
    assert parse_mask(name, GRID) == mask
    assert name.partition(":")[0] in {form.partition(":")[0] for form in FORMS}


@pytest.mark.parametrize(
    "name", ["sparse", "frames", "frames:1/2/3", "frames:-1", "window:1/1/1", "tiles:3/3/3", "radial:all", "causal:1"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"mask: expected one of dense, same-frame, .*, got"):
        parse_mask(name, GRID)


def test_what_cannot_be_measured():
    model, inputs = vdit(mask=FrameMask.causal())
    with pytest.raises(ValueError, match="measure_masks: the model must be one without a mask, got FrameMask"):
        measure_masks(model, inputs, MASKS)
    torch.manual_seed(0)
    model = VDiT(VDiTConfig(width=48, depth=1, heads=2))
    with pytest.raises(ValueError, match="measure_masks: the model must have full attention, got factorized"):
        measure_masks(model, inputs, MASKS)
    model, inputs = vdit()
    with pytest.raises(ValueError, match=r"measure_masks: calls must be of its 1 calls, got \(3,\) of VDiT"):
        measure_masks(model, inputs, MASKS, calls=(3,))
    with pytest.raises(ValueError, match="calls must be numbers of at least 0"):
        measure_masks(model, inputs, MASKS, calls=())
    with pytest.raises(ValueError, match="masks must be one or more"):
        measure_masks(model, inputs, {})
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_later_calls_are_judged_and_the_rest_is_not_run():
    model, inputs = vdit()
    steps = []

    def sample():
        for step in range(5):
            steps.append(step)
            model(**{**inputs, "timestep": torch.full((2,), 100.0 * step)})

    report = measure_masks(model, sample, {"frames": MASKS["frames"]}, calls=(1, 2), rounds=0)
    assert {kept.call for kept in report.kept} == {1, 2} and steps == [0, 1, 2, 3]
