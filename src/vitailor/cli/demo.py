"""`vitailor demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo import Demo

EXAMPLE = o.example("vitailor demo")
FOLDER = Path("vitailor-demo")


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the page and the compressed models; vitailor-demo, replaced each time.",
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    seed: o.Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compress a small ViT that comes with the install by every method, and compare them. No network."""
    from . import setup
    from .console import emit, progress

    # What an earlier demo wrote to its own folder is nothing to lose.
    setup.check_folder(output or FOLDER, overwrite or output is None)
    where = setup.device_of(device)

    from ..demo import demo as run

    with progress("compressing") as advance:
        found = run(output or FOLDER, device=where, seed=seed, progress=advance)
    emit(found.to_json(), json, lambda out: _draw(out, found))


def _draw(out: Console, found: Demo) -> None:
    from rich.table import Table

    from ..reporting import count, signed

    table = Table(box=None, header_style="bold")
    table.add_column("method", overflow="fold")
    for name in ("keep", "MACs", "params", "top-1 %", "95%", "change", "95%, paired"):
        table.add_column(name, justify="right")
    measured = [entry.run.accuracy for entry in found.entries]
    first, dense = found.entries[0].run, measured[0]
    if dense is not None and dense.before is not None:
        costs = (count(first.macs_before or 0), count(first.params_before or 0))
        table.add_row(
            "dense", "1", *costs, f"{dense.before:.1f}", _ends(dense.before_interval), "", ""
        )
    for entry, accuracy in zip(found.entries, measured, strict=True):
        row = [entry.method, f"{entry.keep:g}", count(entry.run.macs), count(entry.run.params)]
        if accuracy is not None:
            row += [f"{accuracy.after:.1f}", _ends(accuracy.after_interval)]
            if accuracy.before is not None:
                change = signed(accuracy.after - accuracy.before)
                row += [change, _ends(accuracy.difference_interval)]
        table.add_row(*row)
    out.print(table)
    for name, keep in found.out_of_reach:
        out.print(f"{name}: no plan keeps as little as {keep:g} of the MACs")
    images = dense.images if dense is not None else None
    out.print(f"n = {images} test images; only vtp trained, for two epochs. Report: {found.report}")


def _ends(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else ""


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(demo), epilog=EXAMPLE)(demo)
