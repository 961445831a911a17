"""What the benchmark's tests share: the command line in this process, and points that are measured in it."""

import pytest
from typer.testing import CliRunner

from vdcore.cli.commands import app
from vdcore_bench.measure import machine, memory
from vdcore_bench.suites import sweep
from vdcore_bench.suites.models import block


@pytest.fixture(scope="session")
def invoke():
    """The command line in this process: returns what it prints."""

    def invoke(*arguments, code=0):
        # With this allocator it does not go on in a child.
        done = CliRunner(env=machine.RAISED).invoke(app, [*map(str, arguments)])
        assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
        return done.output

    return invoke


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures in this process, in three calls, what otherwise has one of its own, as test_profile.py has it."""
    monkeypatch.setattr(memory, "ENOUGH", 0.0)
    for module in (block, sweep):
        monkeypatch.setattr(module, "in_process", lambda function, *arguments: function(*arguments))
