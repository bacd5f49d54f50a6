"""`vitailor train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..processes import is_first_process
from . import options as o

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..training import TrainConfig

EXAMPLE = o.example(
    "vitailor train small/ --data photos/train --val photos/val --teacher vit_tiny_patch16_224 "
    "--epochs 5 -o tuned/",
    "torchrun --nproc-per-node 8 -m vitailor.cli train small/ --data photos/train --precision bf16 "
    "-o tuned/",
)


def train(
    model: o.Model,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DATA", help="Training images; unlabeled ones need a teacher."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write the result to."),
    ],
    val: Annotated[
        str | None,
        typer.Option(
            "--val",
            metavar="DATA",
            help="Labeled images to measure top-1 on after each epoch.",
            rich_help_panel="Images",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="Model to learn from; by default the one MODEL was cut from, when it is at hand.",
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="KIND",
            help="What to learn from the teacher: soft, hard or feature, without labels unless "
            "--set alpha=0.5 or the like; or none. Soft where there is a teacher.",
        ),
    ] = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.LearningRate = None,
    precision: o.Precision = None,
    checkpoint_every: o.CheckpointEvery = None,
    workers: o.Workers = None,
    tracker: Annotated[
        str | None,
        typer.Option("--tracker", metavar="NAME", help="tensorboard, wandb, ... of Accelerate."),
    ] = None,
    settings: o.Settings = None,
    config: o.Config = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    images: o.Images = None,
    class_map: o.ClassMap = None,
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
    """Fine-tune a model, or distil it from another; any model, compressed or not.

    The result is a folder as compress writes it; checkpoints/ in it holds the last and the best state.
    Runs under torchrun and accelerate launch without other arguments; the batch size is that of all
    processes together. --set takes every other setting: ema, mixup, rand_augment, schedule, ...
    """
    transform = o.preprocessing_settings(input_size, crop_pct, interpolation, mean, std)
    from . import settings as s
    from . import setup
    from .console import emit, training_progress

    fields, sets = s.read_config(config), s.parse_sets(settings or [])
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "workers": workers,
        "tracker": tracker,
        "distill": distill,
    }
    fields |= {"seed": seed} | {name: value for name, value in given.items() if value is not None}
    if distill == "none":
        fields["distill"] = None
    if is_first_process():
        begun = (output / setup.CHECKPOINTS).is_dir()
        setup.check_folder(output, overwrite or (resume and begun))
    for folder in (data, val):
        if folder is not None:
            setup.check_data(folder)
    setup.check_file("--class-map", class_map)
    if device is not None:
        setup.device_of(device)

    from ..training import TrainConfig

    made = s.make_config("train", TrainConfig, fields, sets)

    from ..artifact import save
    from ..preprocessing import resolve_preprocessing
    from ..provenance import provenance_of
    from ..trainer import train as fine_tune

    opened = setup.open_model(model, weights, num_classes)
    made, other, taught_by = with_teacher(
        opened.model, made, teacher, data, wanted=distill != "none"
    )
    with training_progress() as telling:
        trained = fine_tune(
            opened.model,
            data,
            made,
            val=val,
            teacher=other,
            folder=output / setup.CHECKPOINTS,
            resume=resume,
            images=images,
            class_map=class_map,
            device=device,
            preprocessing=resolve_preprocessing(opened.model, **transform),
            on_event=lambda event: telling.event("training", event),
        )
    if not is_first_process():
        return
    save(trained, output, overwrite=True)
    known = provenance_of(trained)
    facts = known.record["training"] if known is not None else {}
    payload: dict[str, Any] = {
        "out": str(output),
        "epochs": facts["epochs"],
        "top1": facts["top1"][-1] if facts["top1"] else None,
        "images_per_s": facts["images_per_s"],
        "losses": facts["losses"],
    }
    emit(payload, json, lambda out: _draw(out, payload, taught_by))


def with_teacher(
    model: nn.Module, config: TrainConfig, name: str | None, data: str, wanted: bool
) -> tuple[TrainConfig, nn.Module | None, str]:
    """The settings with what is learned from a teacher; the teacher that is named, or the dense model where it is at
    hand; and what it is called.

    Raises:
        UsageError: when one is needed and there is none, or named and not wanted.
    """
    from ..data.folders import list_images
    from ..data.timm_datasets import PREFIXES
    from ..provenance import provenance_of
    from ..trainer import default_teacher
    from . import setup

    if name is not None and not wanted:
        raise UsageError("--teacher does not go with --distill none.", "Leave one of them out.")
    if name is not None:
        return _distilling(config), setup.open_model(name, None, None).model, name
    found = default_teacher(model) if wanted else None
    if found is not None:
        known = provenance_of(model)
        return _distilling(config), found, known.steps[0].source if known is not None else ""
    named = data.partition(":")[0] == "digits" or data.startswith(PREFIXES)
    if config.distill is not None or (not named and not list_images(Path(data))[1]):
        why = f"{data} has no labels" if config.distill is None else f"distill '{config.distill}'"
        raise UsageError(f"{why}, so a teacher is needed.", "Name one with --teacher.")
    return config, None, ""


def _distilling(config: TrainConfig) -> TrainConfig:
    return config if config.distill else config.model_copy(update={"distill": "soft"})


def _draw(out: Console, payload: dict[str, Any], taught_by: str) -> None:
    loss = payload["losses"][-1] if payload["losses"] else float("nan")
    out.print(
        f"{payload['epochs']} epochs, loss {loss:.4f}, {payload['images_per_s']:.1f} images/s"
    )
    if taught_by:
        out.print(f"teacher {taught_by}")
    if payload["top1"] is None:
        out.print("top-1   not measured (pass --val DATA)")
    else:
        out.print(f"top-1   [bold]{payload['top1']:.2f}%[/bold]")
    out.print(f"wrote {payload['out']}")


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(train), epilog=EXAMPLE)(train)
