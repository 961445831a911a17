"""All cases on the engine built into a folder, forward and backward, in every layout: for tests/asan.sh."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512-bf16", "amx", "amx-emulated")


def instruction_sets():
    """Those that this machine runs: the engine refuses the others."""
    code = "from vdcore.ops.native import native; native().cpu_isa()"
    for isa in INSTRUCTION_SETS:
        env = {**os.environ, "VDCORE_CPU_ISA": isa}
        if subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL).returncode == 0:
            yield isa


def use(build):
    """vdcore's compiled module from a build folder, in place of the installed one."""
    (path,) = Path(build).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("vdcore._native", path)
    sys.modules["vdcore._native"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main(build):
    use(build)
    import torch

    import vdcore
    from vdcore.ops.native import native
    from vdcore.testing import CASES, LAYOUTS, directions, pushed, run

    assert str(Path(build).resolve()) in str(Path(native().__file__).resolve())
    torch.set_num_threads(2)
    start = time.monotonic()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    calls = 0
    for case in CASES:
        function = getattr(vdcore, case.op)
        for i, layout in enumerate(LAYOUTS):
            # What dtypes and layouts do to an index does not depend on one another: all of each, not all pairs.
            for dtype in dtypes if layout == "contiguous" else dtypes[i % 3 :][:1]:
                inputs = case.inputs(dtype, layout=layout, requires_grad=True)
                run(inputs, function, layout=layout, backend="cpu")
                plain = case.inputs(dtype, layout=layout)
                pushed(plain, function, directions(plain), backend="cpu")
                calls += 2
        with torch.no_grad():  # keeps nothing for backward
            function(**inputs.args, backend="cpu")
    print(f"{native().cpu_isa()}: {calls} calls without a report in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1] == "--instruction-sets":
        print(*instruction_sets())
    else:
        main(sys.argv[1])
