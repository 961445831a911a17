"""The errors that docs/faq.md explains are those that the operators raise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdcore
from vdcore import GridMask

PAGE = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
EXPLAINED = re.findall(r"^- `([^`]+)`:", PAGE, re.MULTILINE)


def _double_backward(x):
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(vdcore.temporal_attention(x, x, x).sum(), x, create_graph=True)
    gradient.sum().backward()


WRONG = (
    lambda x: vdcore.video_attention(x, x, x, mask=GridMask.window(1, 1, 1, 1), grid=(4, 4)),
    lambda x: vdcore.video_attention(x, x, x, mask=GridMask.window(1, 1, 1, 1)),
    lambda x: vdcore.patchify(torch.randn(1, 3, 5, 9, 9), torch.randn(8, 3, 1, 2, 2)),
    lambda x: vdcore.temporal_attention(x.flatten(0, 1), x, x),
    lambda x: vdcore.temporal_attention(x, x.half(), x),
    _double_backward,
)
HERE = {"no GPU is visible to torch": "triton", "vdcore._cuda is not built": "cuda"}


def test_every_error_on_the_page_is_raised():
    said = []
    for wrong in WRONG:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            wrong(torch.randn(1, 4, 6, 2, 8))
        said.append(str(error.value))
    for message in EXPLAINED:
        assert message in HERE or any(message in one for one in said), message
    for one in said:
        assert any(message in one for message in EXPLAINED), f"the page does not explain {one}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_why_backends_cannot_run():
    """In a process without Triton's interpreter, which tests have."""
    code = (
        "import torch, vdcore; x = torch.randn(1, 4, 6, 2, 8).bfloat16(); "
        "print(*dict(vdcore.explain('temporal_attention', x, x, x)).items(), sep='\\n')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "VDCORE"))}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for message, backend in HERE.items():
        (line,) = (line for line in found.stdout.splitlines() if f"'{backend}'" in line.partition(",")[0])
        assert message in line or (backend == "cuda" and "no GPU" in line), line
