"""What ptxas made of the Hopper kernels in the built module: instructions, registers, shared memory."""

import re
from dataclasses import dataclass
from functools import cache

import cuda_module
import pytest

pytestmark = [
    pytest.mark.compile("csrc/cuda/frame_attention/forward_sm90.cu", "tests/build/cuda_module.py", tools=["nvcc"]),
    pytest.mark.timeout(1800),
]

SHARED_LIMIT = 232_448  # of a block on sm_90

# By template arguments of FramePlan, as in csrc/cuda/frame_attention/forward_sm90.cu: channels, consumer
# warpgroups, keys per tile, stages. The plan: registers at entry, then of producer and consumers.
PLANS = {
    (64, 3, 128, 2): (128, 32, 160),
    (72, 2, 176, 2): (168, 24, 240),
    (80, 2, 176, 2): (168, 24, 240),
    (96, 2, 176, 2): (168, 24, 240),
    (128, 2, 176, 2): (168, 24, 240),
    (128, 2, 128, 2): (168, 24, 240),
}


@dataclass
class Kernel:
    plan: tuple[int, ...]
    registers: int
    local: int  # bytes of stack and local memory: spills
    code: list[str]

    def count(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.code)


NAME = r"frame_attention_sm90_fwd_kernel\w*?FramePlanILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E\w*?(f16|bf16)E"


@cache
def kernels():
    """By plan and element."""
    usage = {}
    for name, text in re.findall(
        r"Function (\S+):\s*\n\s*(REG:.*)", cuda_module.cuobjdump("-arch", "sm_90a", "-res-usage")
    ):
        usage[name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", text)}
    found = {}
    ours = ",".join(name for name in usage if re.search(NAME, name))
    for part in cuda_module.cuobjdump("-arch", "sm_90a", "-sass", "-fun", ours).split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        if match := re.search(NAME, name):
            plan, element = tuple(int(n) for n in match.groups()[:4]), match.group(5)
            code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S.*?) ;", part)
            found[plan, element] = Kernel(plan, usage[name]["REG"], usage[name]["STACK"] + usage[name]["LOCAL"], code)
    return found


@pytest.fixture(params=[(plan, element) for plan in PLANS for element in ("f16", "bf16")], ids=str)
def kernel(request):
    return kernels()[request.param]


def test_no_kernel_without_a_plan():
    assert {plan for plan, _ in kernels()} == set(PLANS)


def test_registers_and_shared_memory(kernel):
    D, groups, keys, stages = kernel.plan
    entry, producer, consumer = PLANS[kernel.plan]
    assert kernel.registers <= entry and kernel.local == 0
    assert kernel.count(r"\b(LDL|STL)\b") == 0
    assert kernel.count(rf"USETMAXREG\.DEALLOC\S* {producer:#x}") == 1
    assert kernel.count(rf"USETMAXREG\.TRY_ALLOC\S* \S+ {consumer:#x}") == 1
    assert 128 * (producer + groups * consumer) <= 65_536
    columns = -(-D // 64)
    assert 1024 + columns * 128 * (64 * groups + 2 * stages * keys) < SHARED_LIMIT - 512


def test_products_and_loads(kernel):
    """wgmma of the planned sizes and no other, boxes by the tensor memory accelerator, results in 16 bytes."""
    D, _, keys, _ = kernel.plan
    scores, result = kernel.count(rf"HGMMA\.64x{keys}x16\S* .*gdesc"), kernel.count(rf"HGMMA\.64x{D}x16\S* .*tnspB")
    if keys == D:
        scores -= result
    # Each twice: the first scores and the last result stand outside of the loop.
    assert (scores, result) == (2 * -(-D // 16), 2 * keys // 16)
    assert kernel.count(r"\bHGMMA\b") == scores + result and kernel.count(r"\bHMMA\b") == 0
    assert kernel.count(r"UTMALDG\.5D") == 3 * -(-D // 64)
    assert kernel.count(r"STG\.E\.128") > 0 and kernel.count(r"STG\.E\.(U16|64)") == 0


def test_softmax_runs_beside_the_products(kernel):
    """Between the wait for the scores and that for the result: ptxas is free to move the latter up, and once did."""
    waits = [i for i, line in enumerate(kernel.code) if "WARPGROUP.DEPBAR" in line]
    first = next(i for i in waits if "gsb0, 0x1" in kernel.code[i])
    second = next(i for i in waits if i > first)
    between = kernel.code[first:second]
    assert sum("MUFU.EX2" in line for line in between) >= kernel.plan[2] // 2
