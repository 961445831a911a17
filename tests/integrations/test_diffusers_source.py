"""The installed diffusers is the one that replacements were written against."""

import importlib
import pkgutil

import pytest

pytest.importorskip("diffusers")

import diffusers
from host_runs import MODELS

import vdcore.integrations.diffusers as package
from vdcore.integrations.diffusers import TESTED, factorized, families, fingerprints, inference
from vdcore.integrations.diffusers.ranks import models


def test_fingerprints(monkeypatch):
    """Every function that is asked about is known, and none is listed for nothing. On failure: the right table."""
    asked = {}

    def note(*functions):
        asked.update({fingerprints.name_of(function): fingerprints.fingerprint(function) for function in functions})

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(module.name)
        if hasattr(module, "unknown_source"):
            monkeypatch.setattr(module, "unknown_source", note)
    for tiny in MODELS.values():
        package.swap_in(tiny.build())
    note(*inference.RELIES)
    for host in factorized.HOSTS:
        note(host.__call__)
    for host, fused in families.PROCESSORS.items():
        note(host.__call__, *fused.RELIES)
    for family in models.FAMILIES.values():  # what a mesh relies on
        note(*family.relies)
    note(*(host.forward for host in models.LAYERS))
    if diffusers.__version__ in TESTED:
        assert dict(sorted(asked.items())) == fingerprints.FINGERPRINTS
    else:
        assert set(asked) == set(fingerprints.FINGERPRINTS)
