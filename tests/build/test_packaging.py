"""What a user gets: the sdist, and a wheel of it in an environment of its own, without CUDA."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import run_python

import vdcore
from vdcore.ops.choose import BACKENDS

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def make_sdist(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("vdcore-*.tar.gz")
    return found


def make_wheel(source: Path, folder: Path) -> Path:
    """Compiled in the source's own build folder: from the checkout, that is what `make build` has compiled already."""
    run(
        *(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source),
        cwd=folder,
        VDCORE_CUDA="OFF",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Python of an environment that holds the wheel, and sees torch and numpy but not this checkout's vdcore."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(*PIP, "install", "--no-deps", "--target", packages, wheel, cwd=folder)
    of_the_tests = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "test_environment.pth").write_text("\n".join(of_the_tests))
    return python


def tracked(*paths: str) -> set[str]:
    return {x for x in run("git", "ls-files", *paths, cwd=ROOT).split() if (ROOT / x).exists()}


def test_sdist_holds_the_sources(tmp_path: Path) -> None:
    with tarfile.open(make_sdist(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked("csrc", "vdcore", "kernels", "bench", "CMakeLists.txt", "LICENSE")
    assert {x for x in wanted if not x.startswith("bench/results/")} - names == set()


USE = """
import json, sys
for name in ("triton", "diffusers"):
    sys.modules[name] = None  # importing it raises
import torch, vdcore, vdcore_bench
from vdcore.ops.choose import BACKENDS
from vdcore.testing.cases import cases_of

def results(op, backend):
    # Of an operator's plain case: what it returns, and the gradients of what it is given.
    case = cases_of(op, tag="plain")[0].inputs(requires_grad=True)
    out = getattr(vdcore, op)(**case.args, backend=backend)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x)]
    leaves = [x for x in case.leaves.values() if x.requires_grad]
    return [*outs, *torch.autograd.grad([x.sum() for x in outs], leaves)]

far = {}
for op in BACKENDS["reference"].operators:
    ours, expected = (results(op, backend) for backend in ("cpu", "reference"))
    far[op] = max((x - y).abs().max().item() for x, y in zip(ours, expected))
print(json.dumps({
    "file": vdcore.__file__,
    "bench": vdcore_bench.__path__[0],
    "far": far,
    "backends": vdcore.backends(),
}))
"""


def check_wheel(source: Path, folder: Path) -> None:
    """A wheel of the source is small, holds what belongs into it and nothing else, and runs by itself."""
    wheel = make_wheel(source, folder)
    assert wheel.stat().st_size < 4e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = tracked("vdcore/*.py", "kernels/*.py", "bench/*.py")
    wanted = {name.removeprefix("kernels/").removeprefix("bench/") for name in modules}
    assert wanted - names == set()
    compiled = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {"_native"}

    python = install(wheel, folder / "environment")
    found = json.loads(run(python, "-c", USE, cwd=folder, VDCORE_CUDA_EMULATE="0").splitlines()[-1])
    environment = str(python.parents[1])
    assert found["file"].startswith(environment) and found["bench"].startswith(environment)
    assert set(found["far"]) == set(BACKENDS["reference"].operators)
    assert max(found["far"].values()) < 1e-4 and found["backends"]["cpu"] is None
    assert "make cuda" in found["backends"]["cuda"]
    report = run(python, "-m", "vdcore.cli", "doctor", "--json", cwd=folder, VDCORE_CUDA_EMULATE="0")
    said = json.loads(report)["backends"]
    assert said["cpu"] is None and said["cuda"] == found["backends"]["cuda"]


def test_wheel(tmp_path: Path) -> None:
    check_wheel(ROOT, tmp_path)


@pytest.mark.slow
def test_wheel_of_the_sdist(tmp_path: Path) -> None:
    check_wheel(make_sdist(tmp_path), tmp_path)


def test_version_is_said_once() -> None:
    assert importlib.metadata.version("vdcore") == vdcore.__version__
    elsewhere = [name for name in tracked("*.py", "*.toml") if f'"{vdcore.__version__}"' in (ROOT / name).read_text()]
    assert elsewhere == ["vdcore/_version.py"]


@pytest.fixture
def nvcc_for_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """What setup.py would compile CUDA with, by VDCORE_CUDA and what the machine has."""
    found = runpy.run_path(str(ROOT / "setup.py"))["nvcc_for_cuda"]

    def nvcc(wanted: str, *, gpu: bool = False, installed: bool = True) -> str | None:
        monkeypatch.setenv("VDCORE_CUDA", wanted)
        monkeypatch.delenv("CUDACXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}" if installed else None)
        monkeypatch.setitem(found.__globals__, "has_gpu", lambda: gpu)
        return found()

    return nvcc


def test_cuda_is_built_where_there_is_a_gpu_or_it_is_asked_for(nvcc_for_cuda: Callable[..., str | None]) -> None:
    assert nvcc_for_cuda("AUTO") is None
    assert nvcc_for_cuda("AUTO", gpu=True) == "/bin/nvcc"
    assert nvcc_for_cuda("AUTO", gpu=True, installed=False) is None
    assert nvcc_for_cuda("OFF", gpu=True) is None
    assert nvcc_for_cuda("on") == "/bin/nvcc"


def test_cuda_that_is_asked_for_needs_nvcc(nvcc_for_cuda: Callable[..., str | None]) -> None:
    with pytest.raises(SystemExit, match="VDCORE_CUDA=ON: nvcc is neither in PATH"):
        nvcc_for_cuda("ON", installed=False)
    with pytest.raises(SystemExit, match="ON, OFF or AUTO"):
        nvcc_for_cuda("yes")


def test_what_is_missing_and_how_to_build_it() -> None:
    code = """
import sys
sys.modules["vdcore._cuda"] = None  # importing it raises
import torch, vdcore
q = torch.zeros(1, 2, 1, 1, 8)
print(dict(vdcore.explain("temporal_attention", q=q, k=q, v=q))["cuda"])
"""
    said = run_python(code, VDCORE_CUDA_EMULATE="0")
    assert "vdcore._cuda is not built" in said and "make cuda" in said and "VDCORE_CUDA=ON" in said
