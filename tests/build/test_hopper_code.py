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
    (80, 2, 176, 2): (168, 40, 232),
    (96, 2, 176, 2): (168, 40, 232),
    (128, 2, 176, 2): (168, 40, 232),
    (128, 2, 128, 2): (168, 40, 232),
}


@dataclass
class Kernel:
    plan: tuple[int, ...]
    registers: int
    local: int  # bytes of stack and local memory: spills
    addresses: list[int]
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
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ;", part)
            addresses, code = [int(at, 16) for at, _ in lines], [line for _, line in lines]
            spilled = usage[name]["STACK"] + usage[name]["LOCAL"]
            found[plan, element] = Kernel(plan, usage[name]["REG"], spilled, addresses, code)
    return found


@pytest.fixture(params=[(plan, element) for plan in PLANS for element in ("f16", "bf16")], ids=str)
def kernel(request):
    return kernels()[request.param]


def test_no_kernel_without_a_plan():
    assert {plan for plan, _ in kernels()} == set(PLANS)


def test_registers_and_shared_memory(kernel):
    D, groups, keys, stages = kernel.plan
    entry, producer, consumer = PLANS[kernel.plan]
    # setmaxnreg shares out what a launch gives: with fewer at entry, those who wait for more wait for ever.
    assert kernel.registers == entry and kernel.local == 0
    assert kernel.count(r"\b(LDL|STL)\b") == 0
    assert kernel.count(rf"USETMAXREG\.DEALLOC\S* {producer:#x}") == 1
    assert kernel.count(rf"USETMAXREG\.TRY_ALLOC\S* \S+ {consumer:#x}") == 1
    assert producer + groups * consumer == entry * (groups + 1) <= 512
    row = 128 * -(-D // 64)  # bytes of a query or key
    assert 1024 + row * (64 * groups + stages * keys) + 2 * result_channels(D) * stages * keys < SHARED_LIMIT - 512


def result_channels(D):
    """Columns of values divide them: see plan_sm90.cuh."""
    return 64 if D <= 64 else 96 if D <= 96 else 128


def reached_from(kernel, first):
    """Instructions that can follow instruction number ``first``, subroutines and what comes after them included."""
    at = {address: i for i, address in enumerate(kernel.addresses)}
    todo, seen = [first], set()
    while todo:
        i = todo.pop()
        if i in seen or i >= len(kernel.code):
            continue
        seen.add(i)
        line = kernel.code[i]
        operation = re.sub(r"^@!?U?P\w+\s+", "", line)
        if target := re.search(r"\b(?:BRA|CALL)\S*.*?(0x[0-9a-f]+)$", operation):
            todo.append(at[int(target.group(1), 16)])
        if not re.match(r"(BRA|EXIT|RET)\b", operation) or operation != line or re.search(r"BRA\S* !?U?P\d", operation):
            todo.append(i + 1)
    return [kernel.code[i] for i in sorted(seen)]


def test_the_producer_keeps_to_its_registers(kernel):
    """After it has given the others away, these are not its own any more."""
    given = next(i for i, line in enumerate(kernel.code) if "USETMAXREG.DEALLOC" in line)
    reached = reached_from(kernel, given)
    assert any("UTMALDG" in line for line in reached) and not any("HGMMA" in line for line in reached)
    used = {int(n) + i for line in reached for n, wide in REGISTER.findall(line) for i in range(2 if wide else 1)}
    assert max(used) < PLANS[kernel.plan][1]


def test_products_and_loads(kernel):
    """wgmma of the planned sizes and no other, boxes by the tensor memory accelerator, results in 16 bytes."""
    D, _, keys, _ = kernel.plan
    N = result_channels(D)
    scores, result = kernel.count(rf"HGMMA\.64x{keys}x16\S* .*gdesc"), kernel.count(rf"HGMMA\.64x{N}x16\S* .*tnspB")
    if keys == N:
        scores -= result
    # Each twice: the first scores and the last result stand outside of the loop.
    assert (scores, result) == (2 * -(-D // 16), 2 * keys // 16)
    assert kernel.count(r"\bHGMMA\b") == scores + result and kernel.count(r"\bHMMA\b") == 0
    boxes, clusters = -(-D // 64) + (3 if N == 96 else N // 64), D > 96
    assert kernel.count(r"UTMALDG\.5D\.MULTICAST") == (boxes if clusters else 0)  # for both blocks of a cluster
    queries = -(-D // 64)
    assert kernel.count(r"UTMALDG\.5D") == (2 if clusters else 1) * boxes + queries  # of a block by itself, too
    assert kernel.count(r"UTMACCTL\.PF") == 6
    assert kernel.count(r"STG\.E\.128") > 0 and kernel.count(r"STG\.E\.(U16|64)") == 0


# ---- Registers of products in flight ----

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+), )?.*")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")


def touched_in_flight(code):
    """Instructions that read or write a register of the result or of the first operand of a wgmma in flight.

    PTX leaves undefined what happens then, and nothing but the compiler's care keeps them behind the wait.
    """
    groups, now, found = [], set(), []
    for line in code:
        if product := PRODUCT.match(line):
            columns, result, operand = product.groups()
            now |= set(range(int(result), int(result) + int(columns) // 2))
            now |= set(range(int(operand), int(operand) + 4)) if operand else set()
            if "gsb0" in line:  # the last of its group
                groups, now = [*groups, now], set()
        elif wait := WAIT.match(line):
            left = int(wait.group(1))
            groups = groups[-left:] if left else []
        else:
            used = {int(n) + i for n, wide in REGISTER.findall(line) for i in range(2 if wide else 1)}
            if used & now.union(*groups) and not line.startswith("WARPGROUP"):
                found.append(line)
    return found


def test_registers_in_flight_are_not_touched(kernel):
    assert kernel.count(PRODUCT.pattern) > 10 and kernel.count(WAIT.pattern) >= 3
    assert not touched_in_flight(kernel.code)


def test_a_register_that_is_touched_in_flight_is_found(kernel):
    """The same code with an addition to a result before each wait."""
    waits = [i for i, line in enumerate(kernel.code) if WAIT.match(line)]
    result = next(PRODUCT.match(line).group(2) for line in kernel.code[: waits[0]][::-1] if PRODUCT.match(line))
    wrong = [*kernel.code[: waits[0]], f"FADD R{result}, R0, R1", *kernel.code[waits[0] :]]
    assert touched_in_flight(wrong)


def test_softmax_runs_beside_the_products(kernel):
    """Between the wait for the scores and that for the result: ptxas is free to move the latter up, and once did."""
    waits = [i for i, line in enumerate(kernel.code) if "WARPGROUP.DEPBAR" in line]
    first = next(i for i in waits if "gsb0, 0x1" in kernel.code[i])
    second = next(i for i in waits if i > first)
    between = kernel.code[first:second]
    assert sum("MUFU.EX2" in line for line in between) >= kernel.plan[2] // 2
