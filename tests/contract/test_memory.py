"""Forward keeps nothing but its result: inputs, output, lse with gradients, and at most 1 MB a thread."""

import pytest
from support import run_python

CODE = """
import resource, torch, vdcore
T, S, H, D = {shape}
dtype = torch.{dtype}
q, k, v = torch.randn(1, T, S, 3, H, D).to(dtype).unbind(3)
norm = vdcore.QKNorm(torch.ones(D), torch.ones(D))
def call(n):
    return vdcore.temporal_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], norm=norm, backend="cpu", **dict({kwargs}))
call(8)                                # threads and their scratch exist
def peak():                            # kilobytes; reset by writing 5 to clear_refs
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
out = call(S)
out, lse = out if isinstance(out, tuple) else (out, None)
results = out.nbytes + (0 if lse is None else lse.nbytes)
print((peak() - before) * 1024 - results)
"""


@pytest.mark.parametrize("kwargs", ["", "return_lse=True", "mask=vdcore.FrameMask(past=5, future=0, sink=1)"])
@pytest.mark.parametrize(
    "shape,dtype", [((16, 512, 16, 72), "float32"), ((28, 200, 24, 128), "bfloat16"), ((200, 40, 8, 64), "float32")]
)
def test_temporal_forward(shape, dtype, kwargs):
    import torch

    extra = int(run_python(CODE.format(shape=shape, dtype=dtype, kwargs=kwargs)))
    assert extra <= torch.get_num_threads() * 2**20 + 2**20, (
        f"{extra} bytes beyond the results"
    )  # 1 MB for the measuring
