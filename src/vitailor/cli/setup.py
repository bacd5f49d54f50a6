"""From options to models and devices, and what can be checked before any heavy work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, DataError, UsageError

if TYPE_CHECKING:
    from ..models import OpenedModel


def check_data(data: str) -> None:
    """Refuse an image folder that is not there; named datasets are checked when they are opened.

    Raises:
        DataError: saying why it cannot be opened.
    """
    from ..data.folders import list_images
    from ..data.timm_datasets import PREFIXES

    if data.partition(":")[0] != "digits" and not data.startswith(PREFIXES):
        folder = Path(data)
        if not folder.is_dir():
            list_images(folder)  # raises, with the reason


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that an option names and that is not there.

    Raises:
        DataError: naming option and file.
    """
    if path is not None and not path.is_file():
        raise DataError(f"{option} {path} is not a file.", "Check the path.")


def check_positive(option: str, number: int | None) -> None:
    """Refuse a count that is not one.

    Raises:
        UsageError: naming the option.
    """
    if number is not None and number < 1:
        raise UsageError(f"{option} {number} is not positive.", "Give 1 or more.")


def check_folder(path: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or holds something.

    Raises:
        ArtifactError: saying which.
    """
    if path.is_file() or (path.is_dir() and not overwrite and any(path.iterdir())):
        what = "a file" if path.is_file() else "not empty"
        mend = "" if path.is_file() else ", or replace what is there with --overwrite"
        raise ArtifactError(f"{path} is {what}.", f"Choose another folder with -o{mend}.")
    from ..artifact.folders import require_elsewhere

    require_elsewhere(path)
    _check_writable(path)
    _check_writable(
        path.absolute().parent
    )  # a new folder is made beside the old one, and exchanged for it


#: Where training keeps its checkpoints inside an output folder.
CHECKPOINTS = "checkpoints"


def check_output_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file that cannot be written or exists.

    Raises:
        ArtifactError: saying which.
    """
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder.", "Name a file with -o.")
    if path.exists() and not overwrite:
        raise ArtifactError(
            f"{path} exists.", "Choose another file with -o, or replace it with --overwrite."
        )
    _check_writable(path)


def _check_writable(path: Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() and there != path:
        raise ArtifactError(f"{there} is a file, not a folder.", "Choose another place with -o.")
    if not os.access(there, os.W_OK):
        raise ArtifactError(f"{there} cannot be written.", "Choose another place with -o.")


def device_of(name: str | None) -> str:
    """The device to run on: the one named, else a GPU where there is one.

    Raises:
        UsageError: when this machine does not have it.
    """
    import torch

    if name is None:
        # Each of several processes on a machine has a GPU of its own.
        rank = os.environ.get("LOCAL_RANK")
        own = "cuda" if rank is None else f"cuda:{rank}"
        return own if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UsageError(
            f"--device {name} cannot be used: {why}.", "Choose cpu, or a device this machine has."
        ) from None
    return name


def open_model(
    spec: str, weights: Path | None, num_classes: int | None, *, pretrained: bool = True
) -> OpenedModel:
    """The model that a command line names."""
    from ..models import open_model as open_

    check_file("--weights", weights)
    check_positive("--num-classes", num_classes)
    return open_(spec, weights=weights, num_classes=num_classes, pretrained=pretrained)
