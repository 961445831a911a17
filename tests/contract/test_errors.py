"""Wrong input is an error that names operator, argument, what was expected and what came."""

import pytest
import torch

import vdcore
from vdcore import FrameMask, GridMask, QKNorm, Rope, TileLists


def qkv(T_k=4, G=2, **kwargs):
    return (
        torch.randn(2, 4, 3, 2, 8, **kwargs),
        torch.randn(2, T_k, 3, G, 8, **kwargs),
        torch.randn(2, T_k, 3, G, 8, **kwargs),
    )


q, k, v = qkv()
x = torch.randn(2, 3, 4, 8)
video = torch.randn(1, 3, 4, 6, 8)
table = torch.randn(4, 3, 4)

TILES = {"tile": (2, 1, 3), "grid": (1, 3)}  # two of them


def lists(n=2, heads=1, first=(0, 1), count=2):
    indices = torch.tensor([0, 1]).repeat(1, heads, n, 1)
    indices[0, 0, 0] = torch.tensor(first)
    counts = torch.full((1, heads, n), 2)
    counts[0, 0, 1] = count
    return TileLists(indices.int(), counts.int())


WRONG = [
    (ValueError, "temporal_attention", (q[0], k, v), {}, ["q", "(B, T, S, H, D)", "(4, 3, 2, 8)"]),
    (ValueError, "temporal_attention", (q, k[:, :, :2], v[:, :, :2]), {}, ["k", "(2, 4, 3, 2, 8)", "(2, 4, 2, 2, 8)"]),
    (ValueError, "temporal_attention", (q, k, v[:, :3]), {}, ["v", "(2, 4, 3, 2, 8)", "(2, 3, 3, 2, 8)"]),
    (ValueError, "temporal_attention", (q, k, None), {}, ["k and v", "both given"]),
    (ValueError, "temporal_attention", (q,), {}, ["q", "(B, T, S, 3, H, D)", "(2, 4, 3, 2, 8)"]),
    (
        ValueError,
        "video_attention",
        (torch.randn(1, 2, 3, 3, 8), torch.randn(1, 2, 3, 2, 8), torch.randn(1, 2, 3, 2, 8)),
        {},
        ["k", "divides H = 3", "G = 2"],
    ),
    (TypeError, "temporal_attention", (q, k.half(), v), {}, ["k", "torch.float32", "torch.float16"]),
    (
        TypeError,
        "temporal_attention",
        (q.int(), k.int(), v.int()),
        {},
        ["q", "float32, float16, bfloat16 or float64", "torch.int32"],
    ),
    (TypeError, "temporal_attention", ("q", k, v), {}, ["q", "a tensor", "str"]),
    (TypeError, "temporal_attention", (q, k, v), {"mask": "causal"}, ["mask", "FrameMask", "str"]),
    (ValueError, "temporal_attention", (q, k, v), {"q_start": -1}, ["q_start", "at least 0", "-1"]),
    (TypeError, "temporal_attention", (q, k, v), {"q_start": 1.5}, ["q_start", "int", "float"]),
    (ValueError, "temporal_attention", (q, k, v), {"lengths": torch.tensor([1, 2, 3])}, ["lengths", "(2,)", "(3,)"]),
    (
        TypeError,
        "temporal_attention",
        (q, k, v),
        {"lengths": torch.tensor([1.0, 2.0])},
        ["lengths", "int64", "float32"],
    ),
    (TypeError, "temporal_attention", (q, k, v), {"scale": "big"}, ["scale", "number", "str"]),
    (TypeError, "temporal_attention", (q, k, v), {"norm": 3}, ["norm", "QKNorm", "int"]),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"norm": QKNorm(torch.ones(7), None)},
        ["norm.q_weight", "(8,)", "(7,)"],
    ),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"norm": QKNorm(torch.ones(8), None, over="all")},
        ["norm.q_weight", "(H*D,) = (16,)", "(8,)"],
    ),
    (
        TypeError,
        "temporal_attention",
        (q, k, v),
        {"norm": QKNorm(torch.ones(8).half(), None)},
        ["norm.q_weight", "float32", "float16"],
    ),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"rope": Rope(table[:3], table[:3])},
        ["rope.cos", "at least 4 frames", "(3, 3, 4)"],
    ),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"rope": Rope(table[:, :2], table[:, :2])},
        ["rope.cos", "S = 3", "(4, 2, 4)"],
    ),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"rope": Rope(torch.randn(4, 1, 5), torch.randn(4, 1, 5))},
        ["rope.cos", "D/2 = 4", "(4, 1, 5)"],
    ),
    (
        ValueError,
        "temporal_attention",
        (q, k, v),
        {"rope": Rope(torch.randn(4, 1, 3, 4), torch.randn(4, 1, 3, 4))},
        ["rope.cos", "H = 2", "(4, 1, 3, 4)"],
    ),
    (ValueError, "temporal_attention", (q, k, v), {"backend": "cuda9"}, ["backend", "reference", "cuda9"]),
    (ValueError, "spatial_attention", (q, k[:, :3], v[:, :3]), {}, ["k", "(2, 4, 3, 2, 8)", "(2, 3, 3, 2, 8)"]),
    (ValueError, "video_attention", (q, k, v), {"text_sees": "none"}, ["text_sees", "'all' or 'text'", "'none'"]),
    (TypeError, "video_attention", (q, k, v), {"text": q}, ["text", "tuple (q, k, v)", "Tensor"]),
    (ValueError, "video_attention", (q, k, v), {"text": (x, x, x)}, ["text[0]", "(B, L, H, D)", "(2, 3, 4, 8)"]),
    (
        ValueError,
        "video_attention",
        (q, k, v),
        {"text_lengths": torch.tensor([1, 1])},
        ["text_lengths", "without text"],
    ),
    (TypeError, "video_attention", (q, k, v), {"mask": "causal"}, ["mask", "FrameMask, a GridMask or a tuple", "str"]),
    (TypeError, "temporal_attention", (q, k, v), {"mask": GridMask()}, ["mask", "a FrameMask", "GridMask"]),
    (ValueError, "video_attention", (q, k, v), {"mask": GridMask(rows=1)}, ["grid", "with a GridMask", "None"]),
    (ValueError, "video_attention", (q, k, v), {"mask": GridMask(rows=1), "grid": (2, 2)}, ["grid", "S = 3", "(2, 2)"]),
    (
        ValueError,
        "video_attention",
        (q, k, v),
        {"mask": GridMask(FrameMask.teacher_forcing(1), rows=1), "grid": (3, 1)},
        ["mask", "2 * 1 frames", "q_start + T = 4"],
    ),
    (ValueError, "video_attention", (q, k, v), {"grid": (2, 2)}, ["grid", "S = 3", "(2, 2)"]),
    (TypeError, "video_attention", (q, k, v), {"grid": 3}, ["grid", "tuple of two ints", "3"]),
    (ValueError, "video_attention", (q, k, v), {"mask": ((1, FrameMask()),)}, ["mask", "H = 2", "1"]),
    (ValueError, "video_attention", (q, k, v), {"mask": ((3, FrameMask()), (-1, FrameMask()))}, ["mask[1]", "-1"]),
    (
        ValueError,
        "video_attention",
        (q, k[..., :1, :], v[..., :1, :]),
        {"mask": ((1, FrameMask()), (1, FrameMask.causal()))},
        ["mask[0]", "multiple of H // G = 2", "1"],
    ),
    (ValueError, "video_attention", (q, k, v), {"mask": ()}, ["mask", "tuple of pairs", "none"]),
    (TypeError, "video_attention", (q, k, v), {"mask": ((2, "all"),)}, ["mask", "pairs", "'all'", "entry 0"]),
    (TypeError, "video_attention", (q, k, v), {"mask": ((2.0, FrameMask()),)}, ["mask[0]", "int", "2.0"]),
    (
        ValueError,
        "tile_attention",
        (q, k[:, :3], v[:, :3], lists()),
        TILES,
        ["k", "(2, 4, 3, 2, 8)", "(2, 3, 3, 2, 8)"],
    ),
    (ValueError, "tile_attention", (q, k, v, lists()), {**TILES, "grid": (2, 2)}, ["grid", "S = 3", "(2, 2)"]),
    (ValueError, "tile_attention", (q, k, v, lists()), {**TILES, "grid": None}, ["grid", "(rows, columns)", "None"]),
    (
        ValueError,
        "tile_attention",
        (q, k, v, lists()),
        {**TILES, "tile": (2, 0, 3)},
        ["tile", "at least 1", "(2, 0, 3)"],
    ),
    (TypeError, "tile_attention", (q, k, v, lists()), {**TILES, "tile": (2, 3)}, ["tile", "three ints", "(2, 3)"]),
    (TypeError, "tile_attention", (q, k, v, torch.zeros(1)), TILES, ["tiles", "TileLists", "Tensor"]),
    (ValueError, "tile_attention", (q, k, v, lists(n=3)), TILES, ["tiles.counts", "n = 2", "(1, 1, 3)"]),
    (ValueError, "tile_attention", (q, k, v, lists(heads=3)), TILES, ["tiles.counts", "H = 2", "(1, 3, 2)"]),
    (ValueError, "tile_attention", (q, k, v, lists(first=[0, 2])), TILES, ["tiles.indices", "0 to n - 1 = 1", "2"]),
    (ValueError, "tile_attention", (q, k, v, lists(first=[-1, 1])), TILES, ["tiles.indices", "0 to n - 1 = 1", "-1"]),
    (ValueError, "tile_attention", (q, k, v, lists(first=[1, 0])), TILES, ["tiles.indices", "ascending", "1 before 0"]),
    (ValueError, "tile_attention", (q, k, v, lists(first=[1, 1])), TILES, ["tiles.indices", "once", "1 before 1"]),
    (ValueError, "tile_attention", (q, k, v, lists(count=3)), TILES, ["tiles.counts", "0 to K = 2", "3"]),
    (ValueError, "tile_attention", (q, k, v, lists(count=-1)), TILES, ["tiles.counts", "0 to K = 2", "-1"]),
    (ValueError, "gated_attention", ((q, k, v), (q, k, v), torch.randn(3, 8)), {}, ["gate", "broadcastable", "(3, 8)"]),
    (TypeError, "gated_attention", (q, (q, k, v), torch.tensor(0.5)), {}, ["spatial", "tuple (q, k, v)"]),
    (ValueError, "cross_attention", (q, x[:1], x[:1]), {}, ["k", "(2, 3, 4, 8)", "(1, 3, 4, 8)"]),
    (
        ValueError,
        "cross_attention",
        (q, torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)),
        {"lengths": torch.ones(2, 3, dtype=torch.int64)},
        ["lengths", "(2,) or (2, 4)", "(2, 3)"],
    ),
    (ValueError, "qk_norm_rope", (q, k[:, :3]), {}, ["k", "(2, 4, 3, 2, 8)", "(2, 3, 3, 2, 8)"]),
    (ValueError, "patchify", (video, torch.randn(5, 3, 1, 4, 2)), {}, ["video", "patch size 4 in its height H", "6"]),
    (ValueError, "patchify", (video, torch.randn(5, 2, 1, 2, 2)), {}, ["weight", "(5, 3, 1, 2, 2)", "(5, 2, 1, 2, 2)"]),
    (ValueError, "patchify", (video[0], torch.randn(5, 3, 1, 2, 2)), {}, ["video", "(B, C, T, H, W)", "(3, 4, 6, 8)"]),
    (
        ValueError,
        "unpatchify",
        (torch.randn(1, 2, 6, 5), torch.randn(12, 5)),
        {"channels": 3, "patch": (1, 2, 2), "grid": (2, 3, 3)},
        ["tokens", "(1, 2, 9, 5)", "(1, 2, 6, 5)"],
    ),
    (
        ValueError,
        "unpatchify",
        (torch.randn(1, 2, 6, 5), torch.randn(12, 5)),
        {"channels": 3, "patch": (1, 2, 2), "grid": (2, 2, 3), "order": "c"},
        ["order", "pt ph pw c", "'c'"],
    ),
    (ValueError, "modulate", (x, torch.randn(2, 7), torch.randn(2, 8)), {}, ["shift", "(B, C)", "(2, 7)"]),
    (
        ValueError,
        "modulate",
        (x, torch.randn(2, 8), torch.randn(2, 8)),
        {"kind": "batch"},
        ["kind", "'layer' or 'rms'", "'batch'"],
    ),
    (ValueError, "gate_residual", (x, x[:, :2], torch.randn(2, 8)), {}, ["x", "(2, 3, 4, 8)", "(2, 2, 4, 8)"]),
]


@pytest.mark.parametrize("kind,op,args,kwargs,parts", WRONG, ids=[f"{row[1]}-{i}" for i, row in enumerate(WRONG)])
def test_wrong_argument(kind, op, args, kwargs, parts):
    with pytest.raises(kind) as caught:
        getattr(vdcore, op)(*args, **kwargs)
    message = str(caught.value)
    for part in parts if "backend" in kwargs else [op, *parts]:
        assert part in message, message


@pytest.mark.parametrize(
    "make,part",
    [
        (lambda: FrameMask(past=-1), "past must be at least 0, got -1"),
        (lambda: FrameMask(chunk=0), "chunk must be at least 1, got 0"),
        (lambda: FrameMask.seconds(-1, 8), "past must be at least 0"),
        (lambda: FrameMask.seconds(1, 0), "fps must be positive"),
        (lambda: QKNorm(None, None, kind="batch"), "kind must be 'rms' or 'layer'"),
        (lambda: QKNorm(None, None, q_bias=torch.ones(3)), "must be None with kind='rms'"),
        (lambda: Rope(table, table[:2]), "sin must have the shape of cos"),
        (lambda: Rope(table, table, "other"), "style must be 'interleaved' or 'half'"),
        (lambda: vdcore.axial_rope((2, 2, 2), (3, 2, 2)), "dims must be three even numbers"),
        (lambda: vdcore.as_frames(torch.randn(1, 7, 2, 8), 3), "frames must divide the 7 tokens"),
        (lambda: vdcore.as_frames(torch.randn(1, 6, 2, 8), 3, "NBHD"), "layout must be"),
        (lambda: vdcore.explain("attention", q, k, v), "op must be one of"),
        (lambda: vdcore.use_backend("fast").__enter__(), "backend must be one of auto, reference"),
    ],
)
def test_wrong_value(make, part):
    with pytest.raises(ValueError) as caught:
        make()
    assert part in str(caught.value)


def test_double_backward_raises():
    leaves = [t.clone().requires_grad_() for t in qkv()]
    out = vdcore.temporal_attention(*leaves)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="temporal_attention: double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "eps,error", [(None, TypeError), ("1", TypeError), (-1.0, ValueError), (float("nan"), ValueError)]
)
def test_eps(eps, error):
    with pytest.raises(error, match="QKNorm: eps must be"):
        QKNorm(None, None, eps=eps)
    x, y = torch.randn(1, 2, 3, 4), torch.randn(1, 4)
    with pytest.raises(error, match="modulate: eps must be"):
        vdcore.modulate(x, y, y, eps=eps)
