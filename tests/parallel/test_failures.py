"""A rank that ends, comes with another shape, or does not come: the others say so within the group's timeout."""

import re
import time
from pathlib import Path

import pytest
import torch

from vdcore.parallel import ExchangeError, messages, switch
from vdcore.parallel.world import WorldError, run_ranks

T, S = 4, 6
PATIENCE = 75  # seconds of a world, its start included; an exchange fails after a third
LATE = 35


def misbehave(mesh, how, folder, checks):
    """Rank 1 does; the others leave what they saw of it."""
    messages.CHECKS = checks
    rank = mesh.get_local_rank()
    x = torch.zeros(1, T // mesh.size(), S, 30000)
    switch(x, mesh, (T, S))
    begin = time.monotonic()
    if rank == 1:
        if how == "leaves":
            torch.distributed.destroy_process_group()
            time.sleep(5)
            return
        if how == "is late":
            time.sleep(LATE)
        x = x[..., : {"other channels": 100}.get(how, 30000)]
        if how == "other batch":
            x = x.expand(3, -1, -1, -1)
    said = "nothing"
    try:
        for _ in range(2):
            switch(x, mesh, (T, S))
    except ExchangeError as error:
        said = str(error)
    Path(folder, str(rank)).write_text(f"{time.monotonic() - begin}\n{said}")


def run(how, folder, checks=False):
    """What rank 0 said."""
    try:
        run_ranks(misbehave, 2, how, str(folder), checks, timeout=PATIENCE)
    except WorldError as error:
        assert how == "is late", error
    seconds, _, said = (folder / "0").read_text().partition("\n")
    assert float(seconds) < LATE
    return said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leaves", "is late"])
def test_the_others_say_so(how, tmp_path):
    assert "rank 0 of 2 could not exchange with the others" in run(how, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["other channels", "other batch"])
def test_other_shapes(how, tmp_path):
    """Where ranks compare sizes an error says which; else gloo ends the rank that gets more than it expects."""
    assert re.search(r"rank \d expects \d+ bytes of rank \d, which sends \d+", run(how, tmp_path, checks=True))
    with pytest.raises(WorldError, match=r"rank \d ended with exit code -6"):
        run_ranks(misbehave, 2, how, str(tmp_path), False, timeout=PATIENCE)


def raise_on_rank_1(mesh):
    if mesh.get_local_rank() == 1:
        raise ValueError("no frames today")
    return mesh.size()


@pytest.mark.slow
def test_a_world_says_which_rank_failed():
    with pytest.raises(WorldError, match=r"rank 1: (.|\n)*no frames today"):
        run_ranks(raise_on_rank_1, 2, timeout=60)
    with pytest.raises(WorldError, match=r"ranks \[0, 1\] took longer than 1 s"):
        run_ranks(raise_on_rank_1, 2, timeout=1)
