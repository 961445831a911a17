"""Hosts' tiny models run without the hosts' warnings."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
