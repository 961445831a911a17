"""``python -m vdcore.cli`` is the program ``vdcore``."""

from vdcore.cli import main

main()
