"""Without a GPU, kernels run under Triton's interpreter and the CUDA emulator: decided before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VDCORE_CUDA_EMULATE", "1")

import pytest


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("large") and not os.environ.get("VDCORE_TEST_LARGE"):
            item.add_marker(pytest.mark.skip(reason="needs many gigabytes of memory: set VDCORE_TEST_LARGE=1"))


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
