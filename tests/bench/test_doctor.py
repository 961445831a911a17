"""``vdcore doctor``, with every extra and on an installation of torch and numpy alone."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types

import pytest

from vdcore import cli, extras
from vdcore.cli import doctor
from vdcore.ops.choose import BACKENDS

EXTRAS = [module for modules in extras.EXTRAS.values() for module in modules]


def vdcore(*arguments, code=0, **environment):
    """Runs ``vdcore`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "vdcore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def hide(tmp_path):
    """Makes an environment in which these packages cannot be imported."""

    def hidden(packages):
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class Hidden:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] in {tuple(packages)!r}: raise ModuleNotFoundError(name, name=name)\n"
            "sys.meta_path.insert(0, Hidden())\n"
        )
        return {"PYTHONPATH": str(tmp_path)}

    return hidden


def test_json(capsys):
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert facts["operators"]["temporal_attention"]["cpu"] == "fwd + bwd"
    assert facts["operators"]["tile_attention"]["cpu"] == "fwd + bwd"
    assert set(facts["chosen"]) == set(facts["operators"]) == set(BACKENDS["reference"].operators)
    assert facts["chosen"]["temporal_attention"]["cpu"] in facts["backends"]
    assert facts["peers"]["torch"] and facts["memory"]["available"]
    assert facts["extras"]["bench"] == []
    rates = facts["products"]
    assert list(rates) == ["float32", "bfloat16", "float16"] and all(rate > 0 for rate in rates.values())


def test_text(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for expected in (
        "temporal_attention",
        "reference",
        "MALLOC_MMAP_THRESHOLD_",
        "xformers",
        "threads",
        "Run models on this CPU in",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("rates", "name", "said"),
    [
        ((100, 180, 170), "bfloat16", "float32 runs at 0.56 of that"),
        ((100, 95, 20), "bfloat16", "float16 runs at 0.21 of that"),
        ((100, 2, 3), "float32", "bfloat16 runs at 0.02 of that"),
        ((100, 110, 200), "float16", "runs at 200 GFLOP/s"),
        ((369, 171, 388), "float32", "float16 runs at 1.1 of that"),  # an Intel CPU without AMX
    ],
)
def test_the_dtype_to_run_models_in(rates, name, said):
    advice = doctor.dtype_advice(dict(zip(("float32", "bfloat16", "float16"), rates)))
    assert f"in {name}:" in advice and said in advice


def test_it_imports_neither_triton_nor_diffusers():
    code = (
        "import sys; from vdcore.cli.commands import app\n"
        "try: app(['doctor', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'triton', 'diffusers', 'xformers', 'matplotlib'} & set(sys.modules)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=plain)


def test_a_plain_installation_is_told_what_is_missing_and_which_extra_brings_it(hide):
    text = vdcore("doctor", **hide([*EXTRAS, "triton"])).stdout
    for extra, modules in extras.EXTRAS.items():
        assert f"{', '.join(modules)} missing: pip install 'vdcore[{extra}]'" in text
    assert "unknown without psutil" in text and "usable" in text and "triton is not installed" in text


def test_json_of_a_plain_installation(hide):
    facts = json.loads(vdcore("doctor", "--json", **hide([*EXTRAS, "triton"])).stdout)
    assert facts["extras"] == {extra: list(modules) for extra, modules in extras.EXTRAS.items()}
    assert facts["memory"] == {"available": None, "total": None} and facts["threads"]["cores"]


def test_kernels_are_not_compiled_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vdcore_bench.aot", raising=False)
    assert doctor.main(["--compile"]) == 1
    assert "triton" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_a_plain_installation_has_help_and_the_same_exit_codes(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vdcore", *arguments])
    with pytest.raises(SystemExit, match=str(code)):
        cli.main()
    capsys.readouterr()
    monkeypatch.setattr(extras, "installed", lambda module: False)
    with pytest.raises(SystemExit, match=str(code)):
        cli.main()
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert "pip install 'vdcore[bench]'" in text


def test_the_help_of_a_plain_installation_names_every_command():
    commands = pytest.importorskip("vdcore.cli.commands")
    names = [command.name or command.callback.__name__ for command in commands.app.registered_commands]
    assert names == list(cli.COMMANDS)


def test_other_commands_name_the_extra_in_one_line(hide):
    done = vdcore("bench", "--op", "modulate", code=1, **hide(["rich", "psutil"]))
    assert done.stderr == "vdcore: rich, psutil missing here: pip install 'vdcore[bench]'\n" and not done.stdout


@pytest.mark.parametrize("package", extras.EXTRAS["bench"])
def test_every_package_of_the_extra_is_asked_for(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vdcore", "train", "--help"])
    monkeypatch.setattr(extras, "installed", lambda module: module != package)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == f"vdcore: {package} missing here: pip install 'vdcore[bench]'\n"


def test_extras_are_those_of_the_package():
    distributions = {"cv2": "opencv-python-headless"}
    required = importlib.metadata.requires("vdcore")
    for extra, modules in extras.EXTRAS.items():
        of_extra = {re.match(r"[\w.-]+", r)[0] for r in required if re.search(rf"extra == ['\"]{extra}['\"]", r)}
        assert {distributions.get(module, module) for module in modules} <= of_extra
    assert list(doctor.EXTRAS) == list(extras.EXTRAS)


def test_compiled_kernels_are_a_table_and_a_problem_is_an_exit_code(monkeypatch, capsys):
    @dataclasses.dataclass
    class Kernel:
        kernel: str
        arch: str
        registers: int
        problem: str | None

    def compile_report(archs, ops):
        asked.append(ops)
        if archs and "sm_1" in archs:
            raise ValueError("sm_1: not known")
        return [Kernel("fwd", arch, 96, "it spills" if arch == "sm_80" else None) for arch in archs or ("sm_90",)]

    asked = []
    monkeypatch.setitem(sys.modules, "vdcore_bench.aot", types.SimpleNamespace(compile_report=compile_report))
    for arguments, code in (([], 0), (["--arch", "sm_90,sm_80", "--op", "patchify,modulate"], 1)):
        assert doctor.main(["--compile", *arguments]) == code
        text = capsys.readouterr().out
        assert "fwd" in text and ("it spills" in text) == bool(code)
    assert asked == [[], ["patchify", "modulate"]]
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--compile", "--arch", "sm_1"])
    assert "--arch: sm_1: not known" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("value", ["", ",", " , "])
def test_an_arch_that_names_nothing_is_refused(value, more, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--compile", *more, "--arch", "sm_90", "--arch", value])
    assert f"--arch: expected architectures such as sm_90 or sm_80,gfx942, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["gfx000", "gfx9", "gfx12345", "gfx"])
def test_amd_s_names_that_llvm_does_not_know_are_refused_by_name(arch, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--compile", "--arch", f"sm_90,{arch}"])
    assert f"--arch: expected an AMD GPU that LLVM knows, such as gfx942, got '{arch}'" in capsys.readouterr().err
    assert doctor.AMD.fullmatch("gfx942") and doctor.AMD.fullmatch("gfx90a") and doctor.AMD.fullmatch("gfx1201")


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(("name", "value"), [("--arch", "sm_90"), ("--op", "patchify")])
def test_options_of_compile_are_refused_without_it(name, value, more, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main([name, value, *more])
    assert f"{name} is of --compile, got {name} {value} without it" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", ",", "attention", "patchify,attention"])
def test_operators_that_are_none_are_refused_by_name(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--compile", "--op", value])
    said = capsys.readouterr().err
    assert "--op: expected operators of " in said and "tile_attention" in said and f"got {value!r}" in said


def test_machine_code_is_one_json_array(monkeypatch, capsys):
    def report(archs, ops):
        assert ops == ["tile_attention"] * (archs[0] == "sm_80")
        print("1 of 1", file=sys.stderr)
        if "sm_1" in archs:
            raise ValueError("not known")
        if "sm_2" in archs:
            raise KeyboardInterrupt
        if "sm_3" in archs:
            raise PermissionError("a cache that cannot be written")
        bound = {"sm_4": "it fails: RuntimeError: ptxas"}
        return [{"kernel": "fwd", "arch": arch, "regs": 96, "bound_by": bound.get(arch, "issue")} for arch in archs]

    monkeypatch.setitem(sys.modules, "vdcore_bench.machine_code", types.SimpleNamespace(report=report))
    assert doctor.main(["--compile", "--json", "--arch", "sm_80,sm_90", "--op", "tile_attention"]) == 0
    said = capsys.readouterr()
    assert [row["arch"] for row in json.loads(said.out)] == ["sm_80", "sm_90"] and "1 of 1" in said.err
    assert len(said.out.splitlines()) == 4  # a row a line
    for arch, code, words in (("sm_2", 130, "stopped"), ("sm_3", 1, "cannot be written"), ("sm_4", 1, "1 of 1")):
        assert doctor.main(["--compile", "--json", "--arch", arch]) == code
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--compile", "--json", "--arch", "sm_1"])
