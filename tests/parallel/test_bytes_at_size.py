"""Bytes at the sizes of published models: messages of a rank among N, counted on tensors without memory."""

import pytest
from support import run_python

COUNT = """
import json, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from vdcore import FrameMask
from vdcore.parallel import Traffic, explain, part_sizes, switch, video_attention

RANK, N = {rank}, {ranks}
dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=N)
mesh = init_device_mesh("cpu", (N,))
B, T, S, H, D = {shape}
mine = part_sizes(T, N)[RANK]

def counted(call):
    with Traffic(RANK) as traffic, torch.no_grad():
        call()
    return traffic.bytes

def tokens(*rest):
    return torch.empty(B, mine, S, *rest, dtype=torch.bfloat16, device="meta")

def there_and_back():
    back = switch(tokens(H * D), mesh, (T, S))
    switch(back, mesh, (T, S), "tokens", "frames")

def attention(plan, mask=FrameMask()):
    return lambda: video_attention(*(tokens(H, D) for _ in range(3)), mesh=mesh, frames=T, plan=plan, mask=mask)

found = dict(switch=counted(there_and_back))
for plan in ("heads", "ring"):
    found[plan] = counted(attention(plan))
found["window"] = counted(attention("halo", FrameMask.window(3)))
found["own chunks"] = counted(attention("halo", FrameMask(past=0, future=0, chunk=mine)))
print(json.dumps(found))
"""


def count(rank, ranks, shape):
    import json

    code = COUNT.format(rank=rank, ranks=ranks, shape=shape)
    return json.loads(run_python(code).splitlines()[-1])


@pytest.mark.slow
def test_stdit3_at_720p_on_8_ranks():
    """A spatial and a temporal layer of STDiT3: 54 MB by switches, 218 by Ulysses on both, 435 by a ring on both.

    T = 30 is no multiple of 8: ranks with 4 frames send more than the mean of the table, 1/8 of M each.
    """
    shape = (1, 32, 3600, 16, 72)
    M = 2 * 32 * 3600 * 16 * 72  # bytes
    found = count(1, 8, shape)
    assert found["switch"] == 2 * M / 8 * 7 / 8
    assert 2 * found["heads"] == 8 * M / 8 * 7 / 8
    assert found["ring"] == 2 * M * 7 / 8
    assert found["window"] == 2 * 3 * M / 32  # three frames of keys and values to the next rank
    assert found["own chunks"] == 0
    uneven = [count(rank, 8, (1, 30, *shape[2:])) for rank in range(8)]
    mean = {name: sum(f[name] for f in uneven) / 8e6 for name in uneven[0]}
    assert mean["switch"] == pytest.approx(54, abs=0.5)
    assert 2 * mean["heads"] == pytest.approx(218, abs=0.5)
    assert mean["ring"] == pytest.approx(435, abs=0.6)
    assert mean["window"] == pytest.approx(44, abs=0.5)
