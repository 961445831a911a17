"""What a user gets: a wheel built from the sdist, in an environment of its own, without CUDA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("vdcore-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel, and sees torch and numpy but not this checkout's vdcore."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(
        *(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist),
        cwd=folder,
        VDCORE_CUDA="OFF",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(*pip, "install", "--no-deps", "--target", packages, wheel, cwd=folder)
    (packages / "torch_of_the_test_environment.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "vdcore", "kernels", "bench", "CMakeLists.txt", "LICENSE", cwd=ROOT)
    wanted = {x for x in tracked.split() if not x.startswith("bench/results/") and (ROOT / x).exists()}
    assert wanted - names == set()


def test_wheel_runs_by_itself(installed: Path, tmp_path: Path) -> None:
    script = """
import json, sys
for name in ("triton", "diffusers"):
    sys.modules[name] = None  # importing it raises
import torch, vdcore, vdcore.bench
q = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
mask = vdcore.FrameMask.causal()
out = vdcore.temporal_attention(q, q, q, mask=mask, backend="cpu")
out.sum().backward()
expected = vdcore.temporal_attention(q.detach(), q.detach(), q.detach(), mask=mask, backend="reference")
print(json.dumps({
    "file": vdcore.__file__,
    "bench": vdcore.bench.__path__[0],
    "close": torch.allclose(out, expected, atol=1e-5),
    "grad": bool(q.grad.isfinite().all()),
    "cuda": vdcore.backends()["cuda"],
}))
"""
    found = json.loads(run(installed, "-c", script, cwd=tmp_path).splitlines()[-1])
    environment = str(installed.parents[1])
    assert found["file"].startswith(environment) and found["bench"].startswith(environment)
    assert found["close"] and found["grad"]
    assert found["cuda"]


def test_command_line_is_installed(installed: Path, tmp_path: Path) -> None:
    report = run(installed, "-m", "vdcore.cli", "doctor", "--json", cwd=tmp_path)
    assert json.loads(report)["backends"]["cpu"] is None
