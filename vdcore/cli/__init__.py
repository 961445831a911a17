"""The command line. ``vdcore doctor`` needs torch and numpy alone; every other command needs the extra ``bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vdcore import extras

# What stands in the help where the commands themselves cannot be imported.
COMMANDS = {
    "doctor": "What can run on this machine, and why the rest cannot.",
    "bench": "Measure the operators against naive attention and other libraries.",
    "profile": "Peak memory and time against the number of frames.",
    "masks": "How much of a model's attention masks keep, by layer and head.",
    "train": "Train a small video diffusion transformer.",
    "sample": "Sample videos from it, and measure them.",
    "flicker": "Which frames of a video flicker, where, and what the temporal layers do to it.",
    "demo": "Experiments of minutes, one figure per claim, and a report.",
}


def main() -> None:
    """The program ``vdcore``."""
    missing = extras.missing("bench")
    if missing:
        raise SystemExit(_without_the_extra(missing, sys.argv[1:]))
    from vdcore.cli.commands import app

    app(prog_name="vdcore")


def _without_the_extra(missing: Sequence[str], arguments: Sequence[str]) -> int:
    """The program where packages of the extra are missing: the doctor, and help that says what else there is."""
    advice = f"{', '.join(missing)} missing here: {extras.install('bench')}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print("Usage: vdcore COMMAND ...\n")
        print("\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items()))
        print(f"\nOnly doctor runs without the extra: {advice}")
        return 0 if arguments else 2
    if arguments[0] == "doctor":
        from vdcore.cli import doctor

        return doctor.main(arguments[1:])
    print(f"vdcore: {advice}", file=sys.stderr)
    return 1
