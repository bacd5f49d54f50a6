"""`vitailor evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import Accuracy

EXAMPLE = o.example(
    "vitailor evaluate vit_tiny_patch16_224 photos/val --images 1000",
    "vitailor evaluate small/ photos/val --json",
)


def evaluate(
    model: o.Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder with one subfolder a class, timm dataset name, or digits.",
            show_default=False,
        ),
    ],
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    images: o.Images = None,
    class_map: o.ClassMap = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Images at a time; the default depends on the device.",
        ),
    ] = None,
    workers: o.Workers = None,
    input_size: o.InputSize = None,
    crop_pct: o.CropPct = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Top-1 and top-5 accuracy on labeled images, with a 95% interval."""
    settings = o.preprocessing_settings(input_size, crop_pct, interpolation, mean, std)
    from . import setup
    from .console import emit, progress

    setup.check_data(data)
    setup.check_file("--class-map", class_map)
    where = setup.device_of(device)

    from ..evaluation import evaluate as measure
    from ..preprocessing import resolve_preprocessing

    opened = setup.open_model(model, weights, num_classes).model
    preprocessing = resolve_preprocessing(opened, **settings)
    with progress("evaluating") as advance:
        found = measure(
            opened,
            data,
            preprocessing=preprocessing,
            batch_size=batch_size,
            device=where,
            images=images,
            seed=seed,
            class_map=class_map,
            workers=workers,
            progress=advance,
        )
    emit(found.to_json(), json, lambda out: _draw(out, found))


def _draw(out: Console, found: Accuracy) -> None:
    low, high = found.top1_interval
    out.print(
        f"top-1 [bold]{found.top1:.2f}%[/bold]  (95% interval {low:.2f} to {high:.2f}, "
        f"n = {found.images:,})"
    )
    out.print(f"top-5 {found.top5:.2f}%")


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(evaluate), epilog=EXAMPLE)(evaluate)
