"""`vitailor report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o

EXAMPLE = o.example("vitailor report small-0.6/ small-0.4/ -o report.html")


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Folders that compress wrote.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    overwrite: o.Overwrite = False,
    seed: Annotated[int, typer.Option("--seed", hidden=True)] = 0,
    device: Annotated[str | None, typer.Option("--device", hidden=True)] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compare runs on one HTML page that needs no network."""
    from . import setup
    from .console import emit

    setup.check_output_file(output, overwrite)

    from ..reporting import report as write

    written = write(folders, output)
    emit({"file": str(written)}, json, lambda out: out.print(f"wrote {written}"))


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(report), epilog=EXAMPLE)(report)
