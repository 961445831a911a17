"""Runs diffusers' own tests of its video models, plain and with vdcore in every model right after it is made.

    python tests/integrations/run_diffusers_tests.py CHECKOUT [FILE ...] [--accelerator] [-k WORDS]

CHECKOUT is one of diffusers, of the version that is installed, or near it: its ``tests`` run against the installed
package. Printed is what passes on the host and not on ours, and the figures; the exit status says whether it was empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

TRANSFORMERS = (
    "allegro",
    "anyflow",
    "chronoedit",
    "cogvideox",
    "consisid",
    "cosmos",
    "easyanimate",
    "helios",
    "hunyuan_1_5",
    "hunyuan_video",
    "hunyuan_video_framepack",
    "latte",
    "ltx",
    "ltx2",
    "mochi",
    "motif_video",
    "sana_video",
    "skyreels_v2",
    "temporal",
    "wan",
    "wan_animate",
    "wan_vace",
)
UNETS = ("3d_condition", "motion", "spatiotemporal")
FILES = (
    *(f"tests/models/transformers/test_models_transformer_{name}.py" for name in TRANSFORMERS),
    *(f"tests/models/unets/test_models_unet_{name}.py" for name in UNETS),
)


# ---- Inside of one run ----


class Outcomes:
    """Collects how every test ended, for the process that asked."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome
        if report.outcome == "failed":
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E  ")]
            self.why[report.nodeid] = lines[0][1:].strip() if lines else ""


def swap_every_model() -> None:
    """Every model of diffusers but an autoencoder is swapped in as its constructor returns."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    from vdcore.integrations.diffusers import swap_in

    def serve(cls: Any) -> None:
        made = cls.__init__

        @wraps(made)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            if type(self) is cls:
                swap_in(self)

        cls.__init__ = init

    for name in diffusers._import_structure["models"]:
        cls = getattr(diffusers, name, None)
        is_model = isinstance(cls, type) and issubclass(cls, ModelMixin) and cls is not ModelMixin
        if is_model and ".autoencoders." not in cls.__module__:
            serve(cls)


def run_here(checkout: Path, arguments: list[str], result: Path, swapped: bool, accelerator: bool) -> None:
    """One side: runs pytest in this process."""
    import pytest

    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    if accelerator:
        import tests.testing_utils as utils

        utils.require_accelerator = lambda test: test
    if swapped:
        swap_every_model()
    outcomes = Outcomes()
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    pytest.main([*quiet, *arguments], plugins=[outcomes])
    result.write_text(json.dumps([outcomes.found, outcomes.why]))


# ---- Both sides ----


def outcomes(options: argparse.Namespace, file: str, swapped: bool) -> tuple[dict[str, str], dict[str, str]]:
    """How the tests of a file end, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcomes.json"
        command = [sys.executable, __file__, str(options.checkout), file, "--result", str(result)]
        command += ["--swapped"] * swapped + ["--accelerator"] * options.accelerator
        command += ["-k", options.k] if options.k else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.timeout)
        if not result.exists():
            raise RuntimeError(f"{file}: pytest did not end:\n{said.stdout[-2000:]}{said.stderr[-2000:]}")
        found, why = json.loads(result.read_text())
        return found, why


def compare(options: argparse.Namespace) -> int:
    """Prints what passes on the host and not on ours, file by file; returns how many tests that are."""
    total: Counter[str] = Counter()
    for file in options.files or FILES:
        if not (options.checkout / file).exists():
            print(f"{file}: not in this checkout")
            continue
        host, _ = outcomes(options, file, False)
        ours, why = outcomes(options, file, True)
        passed = [test for test, outcome in host.items() if outcome == "passed"]
        lost = [test for test in passed if ours.get(test) != "passed"]
        total.update(tests=len(host), host=len(passed), ours=len(passed) - len(lost), lost=len(lost))
        print(f"{file}: {len(host)} tests, {len(passed)} pass on the host, {len(passed) - len(lost)} of these on ours")
        for test in lost:
            print(f"  {test.partition('::')[2]}: {ours.get(test, 'not run')}: {why.get(test, '')[:300]}", flush=True)
    print(f"in all: {total['tests']} tests, {total['host']} pass on the host, {total['ours']} of these on ours")
    return total["lost"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=lambda path: Path(path).resolve())
    parser.add_argument("files", nargs="*", help="paths in the checkout; by default those of all video models")
    parser.add_argument("-k", help="pytest's: which tests")
    parser.add_argument(
        "--accelerator", action="store_true", help="run tests that ask for an accelerator on any device"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one side of one file")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--swapped", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result is None:
        return int(compare(options) > 0)
    arguments = [*options.files, *(["-k", options.k] if options.k else [])]
    run_here(options.checkout, arguments, options.result, options.swapped, options.accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
