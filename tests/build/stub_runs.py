"""Every launcher through Triton's real runtime and launchers, on a stub of the driver: prints what it finds as JSON.

usage: stub_runs.py (launchers | ones | rollout | sweeps | windows | host | packing | cache)

A process of its own: nothing may be interpreted here, and the stub stays once it is installed.
"""

import importlib
import json
import pkgutil
import sys
import time
from collections import Counter

import torch

import vdcore
from vdcore import FrameMask, GridMask, QKNorm, Rope, TileLists
from vdcore.ops.choose import BACKENDS
from vdcore.ops.tile_attention.boxes import tiles_of
from vdcore.testing import CASES, directions, pushed, run
from vdcore_bench import stub

BF16 = torch.bfloat16
TAGS = {"plain", "norm_rope", "masked", "long", "lengths", "text", "layout", "windows"}


def kernels():
    """Names of all kernels there are."""
    import vdcore_kernels

    found = set()
    for info in pkgutil.walk_packages(vdcore_kernels.__path__, "vdcore_kernels."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if name.endswith("_kernel") and type(value).__name__ == "JITFunction":
                found.add(name)
    return found


def launchers(here):
    """Cases of every operator, forward and backward, and tangents, until every kernel has been launched."""
    missing, failed, run_cases = kernels(), {}, 0
    cases = sorted(CASES, key=lambda case: "plain" not in case.tags)
    seen = set()
    for case in cases:
        kind = (case.op, frozenset(TAGS.intersection(case.tags)))
        if kind in seen:
            continue
        before = len(here.launches)
        try:
            inputs = case.inputs(BF16, requires_grad=True)
            if dict(vdcore.explain(case.op, **inputs.args))["triton"] is None:
                seen.add(kind)
                run(inputs, getattr(vdcore, case.op), backend="triton")
                if "attention" in case.op and "plain" in case.tags and BACKENDS["triton"].operators[case.op].tangents:
                    with torch.no_grad():
                        pushed(inputs, getattr(vdcore, case.op), directions(inputs), backend="triton")
                run_cases += 1
                if len(here.launches) == before:
                    failed[f"{case.op}: {case.name}"] = "nothing was launched"
        except Exception as error:
            failed[f"{case.op}: {case.name}"] = f"{type(error).__name__}: {error}"[:300]
        missing -= {launched.kernel for launched in here.launches[before:]}
    # Under a gate no case has more frames than fit in registers.
    before = len(here.launches)
    triple = tuple(_qkv(240, 2, 2, 64).values())
    gate = torch.rand(2, 1, dtype=BF16, requires_grad=True)
    out = vdcore.gated_attention(triple, triple, gate, backend="triton")
    torch.autograd.grad(out, [*triple, gate], torch.ones_like(out))
    missing -= {launched.kernel for launched in here.launches[before:]}
    return {"cases": run_cases, "launches": len(here.launches), "missing": sorted(missing), "failed": failed}


def _qkv(T, S, H, D, T_k=0, B=1):
    q = torch.randn(B, T, S, H, D, dtype=BF16, requires_grad=True)
    k, v = (torch.randn(B, T_k or T, S, H, D, dtype=BF16, requires_grad=True) for _ in range(2))
    return {"q": q, "k": k, "v": v}


def _train(op, args):
    out = getattr(vdcore, op)(**args, backend="triton")
    leaves = [x for x in args.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def ones(here):
    """Sizes of 1, which Triton makes constants where it compiles, and None inside of tuples; 8 and 59 channels.

    Calls, with what went wrong, or "".
    """
    calls = {}
    for op in ("temporal_attention", "video_attention", "spatial_attention"):
        for sizes in ((1, 3, 2, 16), (4, 1, 2, 16), (4, 3, 1, 16), (1, 1, 1, 8), (3, 2, 2, 59)):
            calls[f"{op} {sizes}"] = (op, _qkv(*sizes))
    temporal = {
        "past, future 1": {"mask": FrameMask(past=1, future=1)},
        "sink 1": {"mask": FrameMask(past=1, future=0, sink=1)},
        "norm": {"norm": QKNorm(torch.ones(16, dtype=BF16), torch.ones(16, dtype=BF16))},
        "rope": {"rope": Rope(torch.ones(4, 1, 8), torch.zeros(4, 1, 8))},
    }
    temporal["norm, rope"] = {**temporal["norm"], **temporal["rope"]}
    calls |= {name: ("temporal_attention", {**_qkv(4, 3, 2, 16), **more}) for name, more in temporal.items()}
    rollout = {**_qkv(1, 3, 2, 16, T_k=2), "q_start": 1, "mask": FrameMask.causal()}
    calls |= {"q_start 1": ("temporal_attention", rollout), "video, q_start 1": ("video_attention", rollout)}
    found = {}
    for name, (op, args) in calls.items():
        before = len(here.launches)
        try:
            _train(op, args)
            found[name] = "" if len(here.launches) > before else "nothing was launched"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    return found


def _compiled_since(here, before):
    return dict(Counter(here.compiled[before:]))


def rollout(here):
    """One frame at a time over a growing cache, and a video in chunks: the compiled kernels of each."""
    found = {}
    with torch.no_grad():
        before = len(here.compiled)
        for t in range(33):
            args = _qkv(1, 20, 2, 64, T_k=t + 1)
            vdcore.temporal_attention(**args, mask=FrameMask.causal(), q_start=t, backend="triton")
        found["33 frames, one at a time"] = _compiled_since(here, before)
        before = len(here.compiled)
        for start in range(0, 51, 3):
            args = _qkv(3, 20, 2, 64, T_k=start + 3)
            vdcore.video_attention(**args, mask=FrameMask(future=0, chunk=3), q_start=start, backend="triton")
        found["51 frames in chunks of 3"] = _compiled_since(here, before)
    return found


def sweeps(here):
    """Kernels that are compiled where one number goes through a range."""
    found = {}
    with torch.no_grad():
        for name, calls in {
            "T of 2 to 16": [{"T": T, "S": 20} for T in range(2, 17)],
            "S of 1 to 40": [{"T": 8, "S": S} for S in (*range(1, 18), 31, 32, 33, 40)],
            "B of 1 to 5": [{"T": 8, "S": 20, "B": B} for B in range(1, 6)],
        }.items():
            before = len(here.compiled)
            for sizes in calls:
                vdcore.temporal_attention(**_qkv(**sizes, H=2, D=64), backend="triton")
            found[name] = _compiled_since(here, before)
    return found


def _listed(T, grid, tile, K):
    n = tiles_of(T, grid, tile)
    listed = torch.arange(min(K, n), dtype=torch.int32).expand(1, 1, n, -1).contiguous()
    return TileLists(listed, torch.full((1, 1, n), listed.shape[3], dtype=torch.int32))


def windows(here):
    """Kernels of windows and of lists, forward and backward, over frames, grids, masks, tiles and lists."""
    mask = GridMask.neighborhood((3, 3, 3))
    sizes = [(T, grid) for T in (1, 2, 5, 16) for grid in ((3, 5), (1, 1), (8, 16), (17, 1))]
    every = [
        *(
            GridMask.neighborhood((3, r, c), causal=causal)
            for r in (1, 3, 5)
            for c in (1, 7)
            for causal in (False, True)
        ),
        *(GridMask.tiles((3, 3, 3), tile) for tile in ((1, 1, 1), (2, 3, 4), (1, 16, 1), (1, 99, 99))),
        *(GridMask.radial(8, 16, sink=sink) for sink in (0, 1, 2)),
        GridMask.window(1, 0, 1, None),
    ]
    calls = {
        "windows: frames and grids": [(T, grid, {"mask": mask}) for T, grid in sizes],
        "windows: masks": [(4, (8, 16), {"mask": one}) for one in every],
        "windows: caches": [(2, (3, 5), {"mask": mask, "q_start": start, "T_k": 9}) for start in (0, 1, 7)],
        "lists: frames and grids": [(T, grid, {"tile": (2, 3, 4), "K": 3}) for T, grid in sizes],
        "lists: tiles": [(4, (8, 16), {"tile": tile, "K": 2}) for tile in ((1, 1, 1), (1, 3, 5), (4, 8, 9), (9, 9, 9))],
        "lists: their lengths": [(4, (3, 5), {"tile": (1, 3, 1), "K": K}) for K in (1, 2, 4, 16)],
    }
    found = {}
    for name, some in calls.items():
        before = len(here.compiled)
        for T, grid, more in some:
            args = {**_qkv(T, grid[0] * grid[1], 2, 64, more.pop("T_k", 0)), "grid": grid, **more}
            if "tile" in args:
                args["tiles"] = _listed(T, grid, args["tile"], args.pop("K"))
            _train("tile_attention" if "tile" in args else "video_attention", args)
        found[name] = _compiled_since(here, before)
    return found


_WINDOW = {"mask": GridMask.neighborhood((3, 3, 3)), "grid": (4, 5)}
_TILES = {"tiles": _listed(16, (4, 5), (2, 2, 2), 4), "tile": (2, 2, 2), "grid": (4, 5)}


def host(here):
    """Microseconds of Python per call, everything compiled: of the operator, and of the launches alone."""
    found = {}
    for name, op, args in (
        ("temporal_attention", "temporal_attention", _qkv(16, 20, 2, 72)),
        ("video_attention", "video_attention", _qkv(16, 20, 2, 64)),
        ("windows", "video_attention", {**_qkv(16, 20, 2, 64), **_WINDOW}),
        ("tile_attention", "tile_attention", {**_qkv(16, 20, 2, 64), **_TILES}),
    ):
        with torch.no_grad():
            call = getattr(vdcore, op)
            for _ in range(20):
                call(**args, backend="triton")
            begin = time.perf_counter()
            for _ in range(200):
                call(**args, backend="triton")
            found[name] = round((time.perf_counter() - begin) / 200 * 1e6, 1)
    return found


def packing(here):
    """A parameter that arrives elsewhere is an error of the stub."""
    args = _qkv(4, 3, 2, 16)
    _train("temporal_attention", args)
    real = here.parameters
    here.parameters = lambda: real()[8:] + bytes(8)
    try:
        _train("temporal_attention", args)
    except RuntimeError as error:
        return str(error)[:80]
    return ""


def cache(here):
    """What is compiled ahead of time is what the runtime asks for: kernels of a job that it compiled again."""
    from vdcore_bench import aot
    from vdcore_bench.jobs import make
    from vdcore_bench.workloads import Budget, load

    def job(op, device):
        options = {"mode": "fwd+bwd", "dtype": BF16, "device": device, "budget": Budget(2e8, 2**22)}
        return make(op, load()["wan2.2-5b-704p" if op != "temporal_attention" else "latte-1-512"], **options)

    again = {}
    for op in ("temporal_attention", "modulate", "qk_norm_rope"):
        aot.compile_launches([("sm_90", op, launch) for launch in aot.job_launches(job(op, "meta"), "sm_90")], 1)
        fresh, loaded = here.fresh, len(here.compiled)
        real = job(op, "cpu")
        tensors = real.leaves()
        out = getattr(vdcore, op)(**real.arguments(tensors), backend="triton")
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, [tensors[n] for n in real.learned], [torch.ones_like(y) for y in outs])
        again[op] = [here.fresh - fresh, len(here.compiled) - loaded]
    return again


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](stub.install())))
