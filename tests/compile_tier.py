"""The compile tier, ``pytest -m compile``: what runs nvcc, c++ or Triton's compiler, unless its sources have passed.

A test module of the tier says what it depends on::

    pytestmark = pytest.mark.compile("tests/emulator/*.cpp", "tests/build/hopper_kernel.cpp", tools=["c++"])

``tests/build/passed.json`` holds, for each such module, a hash of these sources, of what they include and of the module
itself, and the compilers' versions, when all of its tests last passed. Where both are the same today, its tests are
skipped. ``--record-passed`` writes what passes into the file, ``--force-compile`` runs everything.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "tests" / "build" / "passed.json"
INCLUDE_FOLDERS = (ROOT / "csrc", ROOT / "tests")
INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)


def pytest_addoption(parser):
    group = parser.getgroup("compile tier")
    group.addoption("--record-passed", action="store_true", help=f"write what passes into {PASSED.name}")
    group.addoption("--force-compile", action="store_true", help="run what has passed with the same sources, too")


def pytest_configure(config):
    config.pluginmanager.register(Record(config), "compile-tier-record")


# ---- What a module depends on ----


@cache
def version(tool: str) -> str | None:
    """None: it is not here."""
    if tool == "triton":
        try:
            import triton
        except ImportError:
            return None
        return triton.__version__
    if shutil.which(tool) is None:
        return None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return next((line for line in said.splitlines() if "release" in line), said.splitlines()[0]).strip()


def files(sources: tuple[str, ...]) -> dict[Path, bytes]:
    """The files that the patterns name and all that these include, under whatever condition."""
    todo = []
    for pattern in sources:
        found = sorted(ROOT.glob(pattern))
        assert found, f"no file is called {pattern}"
        todo += found
    contents: dict[Path, bytes] = {}
    while todo:
        path = todo.pop().resolve()
        if path in contents:
            continue
        contents[path] = path.read_bytes()
        for name in INCLUDE.findall(contents[path]) if path.suffix != ".py" else ():
            todo += [x for folder in (path.parent, *INCLUDE_FOLDERS) if (x := folder / name.decode()).is_file()]
    return contents


@cache
def state(sources: tuple[str, ...], tools: tuple[str, ...]) -> dict:
    """What decides whether tests have to run."""
    digest = hashlib.sha256()
    for path, content in sorted(files(sources).items()):
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return {"sources": digest.hexdigest(), "tools": {tool: version(tool) for tool in tools}}


def state_of(item) -> dict | None:
    """None: it is not of the tier."""
    marker = item.get_closest_marker("compile")
    if marker is None:
        return None
    return state((*marker.args, item.location[0]), tuple(marker.kwargs.get("tools", ())))


def passed() -> dict[str, dict]:
    return json.loads(PASSED.read_text()) if PASSED.exists() else {}


def pytest_runtest_setup(item):
    now = state_of(item)
    if now is None:
        return
    missing = [tool for tool, found in now["tools"].items() if found is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if not item.config.getoption("--force-compile") and passed().get(item.location[0]) == now:
        pytest.skip(f"its sources are those that passed: {PASSED.name}")
    item.user_properties.append(("compile", now))


# ---- What passes ----


class Record:
    """Collects the reports of all workers, and writes what passed as a whole."""

    def __init__(self, config):
        self.config = config
        self.modules = defaultdict(list)

    def pytest_runtest_logreport(self, report):
        now = dict(report.user_properties).get("compile")
        if now is not None and (report.when == "call" or report.outcome != "passed"):
            self.modules[report.location[0]].append((report.outcome, now))

    def pytest_sessionfinish(self):
        config = self.config
        whole = not config.getoption("keyword") and not any("::" in arg for arg in config.args)
        if not config.getoption("--record-passed") or hasattr(config, "workerinput") or not whole:
            return
        found = passed()
        for module, results in self.modules.items():
            if all(outcome == "passed" for outcome, _ in results):
                found[module] = results[0][1]
        PASSED.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
