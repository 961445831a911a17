"""The compile tier: what has passed is skipped, and what may have changed since runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
pytestmark = pytest.mark.compile("csrc/cuda/*.cu")
def test_one(): pass
def test_other(): assert "wrong" not in open("csrc/cuda/rows.h").read()
"""


@pytest.fixture
def project(tmp_path):
    """A kernel, what it includes, what it does not include, and a module of two tests."""
    for folder in ("csrc/cuda", "tests/build", "tests/emulator"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("compile_tier.py"), tmp_path / "tests")
    (tmp_path / "csrc/cuda/kernel.cu").write_text('#include "cuda/rows.h"\n')
    (tmp_path / "csrc/cuda/rows.h").write_text("")
    (tmp_path / "tests/emulator/emulator.h").write_text("")
    (tmp_path / "tests/test_kernel.py").write_text(TESTS)

    def run(*options, only="tests/test_kernel.py"):
        """How many tests passed, failed and were skipped."""
        command = [sys.executable, "-m", "pytest", "-p", "compile_tier", "-p", "no:cacheprovider", "-c", "none.ini"]
        done = subprocess.run(
            [*command, "--rootdir", ".", only, *options],
            **{"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": "tests", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}},
            **{"capture_output": True, "text": True},
        )
        return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout.splitlines()[-1])}

    (tmp_path / "none.ini").write_text("[pytest]\n")
    run.root = tmp_path
    return run


def test_what_passed_is_skipped_until_it_changes(project):
    assert project() == {"passed": 2}
    assert project("--record-passed") == {"passed": 2}  # nothing was written before
    (project.root / "tests/emulator/emulator.h").write_text("// no part of the kernel")
    assert project() == {"skipped": 2}
    assert project("--force-compile") == {"passed": 2}
    (project.root / "csrc/cuda/rows.h").write_text("// included")
    assert project() == {"passed": 2}


def test_only_a_whole_module_that_passes_is_recorded(project):
    project("--record-passed", only="tests/test_kernel.py::test_one")
    project("--record-passed", "-k", "one")
    assert project() == {"passed": 2}
    (project.root / "csrc/cuda/rows.h").write_text("wrong")
    assert project("--record-passed") == {"passed": 1, "failed": 1}
    assert project() == {"passed": 1, "failed": 1}
