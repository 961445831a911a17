"""The installed diffusers is the one that replacements were written against."""

import importlib
import pkgutil

import pytest

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS

import vdcore.integrations.diffusers as package
from vdcore.integrations.diffusers import TESTED, _families, _host, _inference


def test_fingerprints(monkeypatch):
    """Every function that is asked about is known, and none is listed for nothing. On failure: the right table."""
    asked = {}

    def note(*functions):
        asked.update({_host.name_of(function): _host.fingerprint(function) for function in functions})

    for module in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module.name}")
        if hasattr(module, "unknown_source"):
            monkeypatch.setattr(module, "unknown_source", note)
    for tiny in MODELS.values():
        package.swap_in(tiny.build())
    note(*_inference.RELIES)
    for host in _families._frames.HOSTS:
        note(host.__call__)
    for host, fused in _families.PROCESSORS.items():
        note(host.__call__, *fused.RELIES)
    if diffusers.__version__ in TESTED:
        assert dict(sorted(asked.items())) == _host.FINGERPRINTS
    else:
        assert set(asked) == set(_host.FINGERPRINTS)
