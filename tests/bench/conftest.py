"""What the benchmark's tests share: the command line in this process, and points that are measured in it."""

import pytest
from typer.testing import CliRunner
from vdcore.bench import block, machine, profile

from vdcore.cli.commands import app


@pytest.fixture
def invoke(monkeypatch):
    """The command line in this process: returns what it prints."""
    for name, value in machine.RAISED.items():  # else a child would answer
        monkeypatch.setenv(name, value)

    def invoke(*arguments, code=0):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
        return done.output

    return invoke


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures in this process what has one of its own otherwise, as test_profile.py has it."""
    for module in (block, profile):
        monkeypatch.setattr(module, "in_process", lambda function, *arguments: function(*arguments))
