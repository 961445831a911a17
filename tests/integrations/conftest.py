"""Hosts' tiny models run on one thread, and without the hosts' warnings."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
