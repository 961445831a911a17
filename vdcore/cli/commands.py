"""The command line: what can run here, how fast it is, and what it needs as videos get longer."""

from __future__ import annotations

import typer

from vdcore.cli.bench import bench
from vdcore.cli.demo import demo
from vdcore.cli.flicker import flicker
from vdcore.cli.masks import masks
from vdcore.cli.profile import profile
from vdcore.cli.sample import sample
from vdcore.cli.train import train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def doctor(context: typer.Context) -> None:
    """What can run on this machine, and why the rest cannot."""
    from vdcore.cli import doctor

    raise typer.Exit(doctor.main(context.args))  # reads its options itself, since it also runs where typer is not


for command in (bench, profile, masks, train, sample, flicker, demo):
    app.command()(command)
