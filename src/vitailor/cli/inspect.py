"""`vitailor inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o

EXAMPLE = o.example("vitailor inspect vit_tiny_patch16_224", "vitailor inspect small/ --json")


def inspect(
    model: o.Model,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    seed: Annotated[int, typer.Option("--seed", hidden=True)] = 0,
    device: Annotated[str | None, typer.Option("--device", hidden=True)] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show every dimension of every block, parameters and MACs. Needs no weights: downloads nothing."""
    from . import setup
    from .console import emit

    if device is not None:
        setup.device_of(device)

    from .. import inspection

    opened = setup.open_model(model, weights, num_classes, pretrained=False).model
    emit(inspection.inspect(opened), json, lambda out: out.print(inspection.table(opened)))


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(inspect), epilog=EXAMPLE)(inspect)
