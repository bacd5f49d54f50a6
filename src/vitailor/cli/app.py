"""The typer application: one verb from each file of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import bench, compress, demo, evaluate, inspect, options, report, search, train

app = typer.Typer(
    name="vitailor",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vitailor {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Cut a trained Vision Transformer to a budget; get back a smaller, faster plain model.

    MODEL is a timm name, a T2T-ViT name (t2t_vit_14) or a folder that compress wrote. NAME=FILE gives it
    local weights; then nothing is downloaded. DATA is an image folder (class subfolders; without them
    unlabeled), a timm dataset (hfds/..., wds/..., torch/...), or digits, which come with the install.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.callback(invoke_without_command=True, help=options.prose(_root))(_root)
demo.register(app)
compress.register(app)
evaluate.register(app)
bench.register(app)
inspect.register(app)
report.register(app)
train.register(app)
search.register(app)


def run(args: Sequence[str]) -> int:
    """Parse and run; every error passes through as it is."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("vitailor", list(args)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    return 0
