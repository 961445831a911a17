"""The hooks that run before each commit: of seconds, on the files of the commit, without a build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / ".pre-commit-config.yaml"
TOOLS = Path(sys.executable).parent

pytest.importorskip("pre_commit")
pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ruff", "clang-format")), reason="the extra lint is not installed"
)


@pytest.fixture
def repository(tmp_path):
    """A repository with our configuration and tools, and nothing else."""
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    for name in (".pre-commit-config.yaml", ".clang-format", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(TOOLS)
    (tmp_path / "csrc").mkdir()
    return tmp_path


def run_hooks(repository):
    subprocess.run(["git", "add", "csrc", "*.py"], cwd=repository, check=True)
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", "run"],
        cwd=repository,
        env={**os.environ, "PRE_COMMIT_HOME": str(repository / ".git" / "pre-commit")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_is_badly_formatted_is_formatted_and_what_is_wrong_is_said(repository):
    script, source = repository / "script.py", repository / "csrc" / "source.cpp"
    script.write_text("import os\nx = [1,2]\n")
    source.write_text("int  f( ) {return 1;}\n")
    done = run_hooks(repository)
    assert done.returncode == 1 and "F401" in done.stdout, done.stdout + done.stderr
    assert script.read_text() == "import os\n\nx = [1, 2]\n"
    assert source.read_text() == "int f() { return 1; }\n"
    script.write_text("x = [1, 2]\n")
    done = run_hooks(repository)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_hook_builds():
    assert "make" not in [word for line in CONFIG.read_text().splitlines() if "entry:" in line for word in line.split()]
