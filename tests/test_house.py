"""The plan of the house (docs/design.md): who imports whom, and which files one call runs through."""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import vdcore

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "vdcore": "vdcore",
    "vdcore_kernels": "kernels/vdcore_kernels",
    "vdcore_bench": "bench/vdcore_bench",
    "examples": "examples",
}
VALUES = {"mask", "grid_mask", "tile_lists", "norm", "rope", "geometry", "modes", "extras", "_version"}
# Layer -> the layers that it may import, beside the value types. A layer is a package or a part of vdcore; "vdcore" is
# the public names.
LAYERS = {
    "kernels": set(),
    "ops": {"kernels"},
    "vdcore": {"ops"},
    "testing": {"vdcore", "ops"},
    "video": set(),
    "metrics": set(),
    "export": {"ops"},
    "parallel": {"vdcore", "ops"},
    "models": {"vdcore", "ops", "parallel"},
    "diffusion": {"vdcore", "models", "parallel", "video", "metrics"},
    "integrations": {"vdcore", "models", "parallel", "video"},
    "bench": {"vdcore", "ops", "kernels", "testing", "models", "parallel", "integrations"},
    "cli": {
        *(
            "vdcore",
            "bench",
            "examples",
            "diffusion",
            "testing",
            "models",
            "parallel",
            "integrations",
            "video",
            "metrics",
        )
    },
    "examples": {
        *("cli", "vdcore", "testing", "models", "parallel", "diffusion", "integrations", "video", "metrics", "bench")
    },
}
# Operator -> the operators that it may import.
ROOMS = {
    "qk_norm_rope": set(),
    "temporal_attention": {"qk_norm_rope"},
    "frame_attention": {"qk_norm_rope", "temporal_attention"},
    "gated_attention": {"qk_norm_rope", "temporal_attention", "frame_attention"},
    "cross_attention": {"qk_norm_rope", "temporal_attention", "frame_attention"},
    "tile_attention": {"qk_norm_rope", "temporal_attention", "frame_attention"},
    "patchify": set(),
    "adaln": set(),
}


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name.removeprefix("examples.")] = ast.parse(path.read_text())  # a source root: its files stand alone
    return found


def imports(node: ast.AST, *, inside_functions: bool = True):
    """Pairs (module of ours, name taken from it or ""), without those for annotations alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef) and not inside_functions:
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names if alias.name in modules())
        elif isinstance(child, ast.ImportFrom) and child.module in modules():
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield (inner, "") if inner in modules() else (child.module, alias.name)
        else:
            yield from imports(child, inside_functions=inside_functions)


def part(module: str, i: int) -> str:
    return (module.split(".") + [""] * 3)[i]


def layer_of(module: str) -> str:
    package = part(module, 0)
    if package not in PACKAGES:
        return "examples"
    return (part(module, 1) or package) if package == "vdcore" else package.removeprefix("vdcore_")


def test_layers_import_downward():
    for module, tree in modules().items():
        layer = layer_of(module)
        for target, _ in imports(tree):
            other = layer_of(target)
            may = VALUES | LAYERS.get(layer, set()) | {layer}
            assert other in may, f"{module} imports {target}: {layer} may import {sorted(may)}"


def test_only_the_command_demo_imports_examples_and_only_when_it_runs():
    for module, tree in modules().items():
        if layer_of(module) != "examples":
            lazily = module == "vdcore.cli.demo"
            found = [
                target for target, _ in imports(tree, inside_functions=not lazily) if layer_of(target) == "examples"
            ]
            assert not found, f"{module} imports {found}"


def test_rooms_import_downward():
    for house in ("vdcore.ops.", "vdcore_kernels."):
        for module, tree in modules().items():
            if not module.startswith(house):
                continue
            room = module.removeprefix(house).partition(".")[0]
            may = {room, *ROOMS.get(room, ())}
            for target, _ in imports(tree):
                other = target.removeprefix(house).partition(".")[0]
                if target.startswith(house) and other in ROOMS:
                    assert other in may, f"{module} imports {target}: {room} may import {sorted(may)}"


def test_an_operator_has_rooms_of_one_name():
    assert {path.parent.name for path in (ROOT / "vdcore/ops").glob("*/__init__.py")} == set(ROOMS)
    for place in ("kernels/vdcore_kernels", "csrc/cpu", "csrc/cuda"):
        rooms = {path.name for path in (ROOT / place).iterdir() if path.is_dir() and not path.name.startswith("_")}
        assert rooms <= {"core", *ROOMS}, f"{place} has {sorted(rooms)}"


def test_no_import_runs_in_a_circle():
    trees = modules().items()
    TopologicalSorter({m: {t for t, _ in imports(tree, inside_functions=False)} - {m} for m, tree in trees}).prepare()


def test_nobody_takes_what_another_calls_private():
    for module, tree in modules().items():
        for target, name in imports(tree):
            package, _, last = target.rpartition(".")
            assert not name.startswith("_") or name.startswith("__"), f"{module} takes {name} from {target}"
            private = last.startswith("_") and not module.startswith(package)
            assert not private, f"{module} imports {target}"


def test_files_of_one_call():
    """The second call of temporal attention on the CPU runs through at most 7 files, value types aside."""
    q = torch.randn(1, 4, 3, 2, 16)
    vdcore.temporal_attention(q, q, q, backend="cpu")
    files = set()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        vdcore.temporal_attention(q, q, q)
    finally:
        sys.setprofile(None)
    walked = {Path(f).relative_to(ROOT) for f in files if Path(f).is_relative_to(ROOT / "vdcore")}
    values = {Path("vdcore", f"{name}.py") for name in VALUES}
    assert len(walked - values) <= 7, sorted(map(str, walked))


WALK = """
import sys, torch, vdcore
from vdcore import FrameMask, QKNorm, axial_rope
q, weight = torch.randn(1, 4, 3, 2, 16), torch.ones(16)
rotary = {"norm": QKNorm(weight, weight), "rope": axial_rope((4, 3, 1), (8, 8, 0))}
def call():
    vdcore.temporal_attention(q, q, q, mask=FrameMask.causal(), backend="triton", **rotary)
call()
files = set()
sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename) if event == "call" else None)
call()
sys.setprofile(None)
print(*files, sep="\\n")
"""


def test_files_of_one_triton_call():
    """Masked, with norm and rope: at most 12 files, value types aside, whether they launch kernels or are kernels."""
    pytest.importorskip("triton")
    found = subprocess.run(
        [sys.executable, "-c", WALK], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert found.returncode == 0, found.stderr
    roots = [ROOT / "vdcore", ROOT / "kernels"]
    walked = {Path(f).relative_to(ROOT) for f in found.stdout.split("\n") if any(map(Path(f).is_relative_to, roots))}
    walked -= {Path("vdcore", f"{name}.py") for name in VALUES}
    assert Path("kernels/vdcore_kernels/temporal_attention/forward.py") in walked
    assert len(walked) <= 12, sorted(map(str, walked))


def test_every_folder_of_tests_is_collected(pytestconfig):
    folders = {path.parent.name for path in ROOT.glob("tests/**/test_*.py")}
    left_out = [(name, p) for name in folders for p in pytestconfig.getini("norecursedirs") if fnmatch(name, p)]
    assert "build" in folders and not left_out


def test_a_function_fits_on_a_screen():
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{module}.{node.name} has {lines} lines"


def test_arguments_go_by_name():
    """Kernels and compiled modules get at most 6 arguments by position; nobody gets groups of them, ``*(a, b)``."""
    for module, tree in modules().items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            where = f"{module}, line {call.lineno}"
            grouped = [x for x in call.args if isinstance(x, ast.Starred) and isinstance(x.value, ast.Tuple)]
            assert not grouped, f"{where}: arguments stand in groups"
            name = ast.unparse(call.func)
            if re.fullmatch(r"launch|\w+_kernel\[.*\]|(native|kernels)\(\)\.\w+", name):
                assert len(call.args) <= 6, f"{where}: {name} gets {len(call.args)} arguments by position"
                assert not any(isinstance(x, ast.Starred) for x in call.args), f"{where}: {name} gets *arguments"
