"""Options that several verbs share, and how their texts become values."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..errors import UsageError

T = TypeVar("T")

_IMAGES, _PREPROCESSING, _RUN = "Images", "Preprocessing (default: the model's own)", "Run"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm or T2T-ViT name, or a folder that compress wrote; NAME=FILE gives it local weights.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights of MODEL: .safetensors or .pth."),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes", metavar="N", help="Outputs of the head; the weights' by default."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A setting, e.g. ridge=0.01 or dimensions=qk,v; may be repeated. A wrong name lists all.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings in JSON or TOML."),
]
_TRAINING = "Training"
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs", metavar="N", help="Passes over the images.", rich_help_panel=_TRAINING
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", help="Learning rate.", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Images for an update, over all processes.",
        rich_help_panel=_TRAINING,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="NAME", help="no, bf16 or fp16.", rich_help_panel=_TRAINING
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every",
        metavar="N",
        help="Updates between checkpoints inside an epoch.",
        rich_help_panel=_TRAINING,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the checkpoints in the output folder.",
        rich_help_panel=_TRAINING,
    ),
]

Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        metavar="N",
        help="Draw N images by seed, spread over the classes.",
        rich_help_panel=_IMAGES,
    ),
]
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        "--images",
        metavar="N",
        help="Calibration images, drawn by seed; 512, or all if fewer.",
        rich_help_panel=_IMAGES,
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="DATA",
        help="Images to judge the candidates of a search on; by default some of those to calibrate on.",
        rich_help_panel=_IMAGES,
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="DATA",
        help="Labeled images to measure top-1 on, before and after.",
        rich_help_panel=_IMAGES,
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        metavar="FILE",
        help='Class index of each folder: one folder a line in class order, or JSON {"folder": index}.',
        rich_help_panel=_IMAGES,
    ),
]

InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="SIZE",
        help="Pixels: 224 or 224,320 (height,width).",
        rich_help_panel=_PREPROCESSING,
    ),
]
CropPct = Annotated[
    float | None,
    typer.Option(
        "--crop-pct",
        metavar="F",
        help="Fraction of the resized image that the crop keeps.",
        rich_help_panel=_PREPROCESSING,
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(
        "--interpolation",
        metavar="NAME",
        help="bicubic, bilinear, ...",
        rich_help_panel=_PREPROCESSING,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean", metavar="R,G,B", help="Of pixels in 0 to 1.", rich_help_panel=_PREPROCESSING
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std", metavar="R,G,B", help="Of pixels in 0 to 1.", rich_help_panel=_PREPROCESSING
    ),
]

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        help="Processes that read images; the default depends on the device.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Random seed.", rich_help_panel=_RUN)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; a GPU by default where there is one.",
        rich_help_panel=_RUN,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_RUN),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_RUN),
]


def prose(verb: Callable[..., None]) -> str:
    """A verb's docstring with each paragraph on one line, to be wrapped to the terminal."""
    paragraphs = cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def example(*lines: str) -> str:
    """An epilog that shows commands, one a line."""
    return "Example\n\n" + "\n\n".join(f"  {line}" for line in lines)


def numbers(option: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """Comma-separated numbers, e.g. "224,224".

    Raises:
        UsageError: naming the option.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} '{text}' is not a number, or several with commas between.",
            f"Write for example {option} {'224,224' if kind is int else '0.5,0.5,0.5'}.",
        ) from None


def preprocessing_settings(
    input_size: str | None,
    crop_pct: float | None,
    interpolation: str | None,
    mean: str | None,
    std: str | None,
) -> dict[str, Any]:
    """Keyword arguments for `resolve_preprocessing`, from the options' texts."""
    size = numbers("--input-size", input_size, int)
    if size is not None and len(size) == 1:
        size *= 2
    return {
        "input_size": size,
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "mean": numbers("--mean", mean, float),
        "std": numbers("--std", std, float),
    }


_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)([kKmMgGtT]?)")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def amount(option: str, text: str) -> int | float:
    """A count (750M, 1.2G, 22000000) as an int, or a fraction kept (0.6) as a float.

    Raises:
        UsageError: naming the option.
    """
    found = _AMOUNT.fullmatch(text.strip())
    value = float(found[1]) * _SUFFIXES[found[2].lower()] if found else 0.0
    if not found or value <= 0 or (value > 1 and value != round(value)):
        raise UsageError(
            f"{option} '{text}' is neither a count nor a fraction kept.",
            f"Write for example {option} 750M, {option} 1.2G or {option} 0.6.",
        )
    return int(value) if value > 1 else value
