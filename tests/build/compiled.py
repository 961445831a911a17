"""Compiles the Triton kernels in a process of its own, where nothing is interpreted, and prints what it finds as JSON.

usage: compiled.py report ARCH,ARCH... (all | few)
       compiled.py rows ARCH
       compiled.py narrow ARCH
       compiled.py products ARCH
"""

import dataclasses
import importlib
import json
import pkgutil
import re
import sys

import triton
import triton.language as tl

import vdcore_kernels
from vdcore_bench import aot


def report(archs, which):
    records = aot.compile_report(archs.split(","), few=which == "few")
    return [dataclasses.asdict(record) for record in records]


def rows(arch):
    """Rows of config tables that serve the architecture, and those of them that no call takes."""
    from vdcore_kernels.core.launch import Config

    taken = {launch.config for _, launch in aot.collect(arch)}
    found = {}
    for info in pkgutil.walk_packages(vdcore_kernels.__path__, "vdcore_kernels."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            for i, row in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(row, Config) and row.serves(arch) and name.isupper():
                    found[f"{info.name}.{name}[{i}]"] = row in taken
    return found


# ---- 32-bit products ----

_DEFINED = re.compile(r"^\s*(%[\w#:]+)(?:, %[\w#]+)* = (\S+) (.*)$")


def narrow_products(kernel, strides):
    """Lines where a 32-bit number that comes from the program id is multiplied by a stride."""
    text = re.sub(r" loc\(.*?\)", "", kernel.asm["ttir"])
    names = re.findall(r"(%\w+): ", re.search(r"tt\.func public @\w+\((.*)", text).group(1))
    of_id, of_stride, found = set(), {names[i] for i in strides}, []
    for line in text.splitlines():
        if not (match := _DEFINED.match(line)):
            continue
        name, operation, rest = match.groups()
        used = set(re.findall(r"%[\w#]+", rest))
        narrow = rest.rstrip().endswith(("i32", "i32>"))
        if operation == "tt.get_program_id":
            of_id.add(name)
        elif operation == "arith.muli" and narrow and used & of_id and used & of_stride:
            found.append(line.strip())
        elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") and used & of_stride:
            of_stride.add(name)
        elif used & of_id and narrow:
            of_id.add(name)
    return found


def stride_places(args):
    """Where strides are among the kernel's arguments: the integers of a Rows, a Gate, a Video, ..."""
    from vdcore_kernels.core.gate import Gate
    from vdcore_kernels.core.tile import Angles, Rows
    from vdcore_kernels.patchify.patches import Video
    from vdcore_kernels.qk_norm_rope.backward import Live

    kinds = (Rows, Angles, Gate, Video, Live)
    places, n = [], 0

    def visit(arg, inside, of_kind):
        nonlocal n
        if isinstance(arg, tuple):
            for x in arg:
                visit(x, True, of_kind or isinstance(arg, kinds))
        # None and, in tuples, 1 become constants, and are no arguments.
        elif arg is not None and not (inside and isinstance(arg, int) and arg == 1):
            if of_kind and isinstance(arg, int):
                places.append(n)
            n += 1

    for arg in args:
        visit(arg, False, False)
    return places


@triton.jit
def careless_kernel(x, p_y, S: tl.constexpr):
    i = tl.program_id(0) * S
    tl.store(p_y + i, tl.load(x.p + i * x.s))


def narrow(arch):
    import torch

    from vdcore_kernels.core.launch import Config, Launch
    from vdcore_kernels.core.tile import Rows

    x = torch.empty(8, device="meta")
    arguments = {"x": Rows(x, 8, 8, 8, 8), "p_y": x, "S": 4}
    careless = Launch(careless_kernel, 1, Config("", 4, 1, ""), arguments)
    found = {}
    for launch in (careless, *(launch for _, launch in aot.collect(arch, few=True))):
        places = stride_places(aot.arguments_of(launch)[0])
        lines = narrow_products(aot.compile_launch(launch, arch), places)
        found[launch.kernel.__name__] = found.get(launch.kernel.__name__, []) + lines
    return found


# ---- Products that are computed again ----

A_PRODUCT = 2 * 16 * 8 * 16  # FLOP of a warp's instruction on 16 bits


def products(arch):
    """Of kernels over tiles of tokens: what their call is, and how many products each of their loops multiplies for
    every tile, beside those that a tile needs.
    """
    from vdcore_bench.machine_code.code import code_of
    from vdcore_bench.machine_code.triton import disassembled

    found = []
    for call, launch in aot.collect(arch):
        name, arguments = launch.kernel.__name__, launch.arguments
        if not name.startswith(("frame_attention", "tile_attention")) or arguments["q"].video.p.element_size() != 2:
            continue
        if name.endswith("jvp_kernel"):
            dq, dk, dv = (arguments[side].video.p is not None for side in ("dq", "dk", "dv"))
            needed = 1 + dq + dk + (dq or dk) + dv
        else:
            needed = 4 if name.endswith("kv_kernel") else 3 if name.endswith("bwd_q_kernel") else 2
        tile = arguments["TILE"]
        a_tile = 2 * tile.BM * tile.BN * tile.ROW.width
        code = code_of(disassembled(aot.compile_launch(launch, arch).asm["cubin"]))
        of_loops = [n * launch.config.warps * A_PRODUCT / a_tile for _, n in code.loops]
        found.append({"kernel": name, "call": call, "channels": tile.ROW.D, "needed": needed, "loops": of_loops})
    return found


if __name__ == "__main__":
    tasks = {"report": report, "rows": rows, "narrow": narrow, "products": products}
    print(json.dumps(tasks[sys.argv[1]](*sys.argv[2:])))
