"""Image folders: which files are images, and which class index each class folder has."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import DataError

WNID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000


def list_images(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths of a folder's images ("/" between parts) and its class folders, both sorted.

    Every folder in `root` is a class, with or without images, so that an empty one does not shift the
    numbers of those after it; images may lie deeper in it. Hidden files and folders are ignored.
    Without images in subfolders there are no classes.

    Raises:
        DataError: when the folder is missing, cannot be read, has no images, or has images both in
            class folders and beside them.
    """
    try:
        root.stat()
    except OSError as error:
        raise DataError(
            f"{root} cannot be opened: {error.strerror}.",
            "Name an image folder, a timm dataset (hfds/..., wds/..., torch/...) or digits.",
        ) from None
    if not root.is_dir():
        raise DataError(f"{root} is a file, not an image folder.", "Unpack it and name the folder.")
    known = _extensions()
    names: list[str] = []
    classes: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        if inside == Path():
            classes = list(subfolders)
        names += [
            (inside / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in known
        ]
    names.sort()
    loose = [name for name in names if "/" not in name]
    if not names:
        raise DataError(
            f"{root} has no images.", f"Name a folder with {', '.join(sorted(known))} files."
        )
    if loose and len(loose) < len(names):
        raise DataError(
            f"{root} has images both beside its class folders ({loose[0]}) and in them.",
            "Move the images beside the folders away, or into a class folder.",
        )
    return names, [] if loose else classes


def class_indices(
    root: Path,
    folders: list[str],
    num_classes: int | None = None,
    class_map: str | os.PathLike[str] | Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Class index of each class folder of `root`, given in sorted order.

    Folders are numbered in that order, except that for 1,000 classes ImageNet synsets have ImageNet's
    indices. A class map overrides both.

    Args:
        num_classes: outputs of the model's head; None accepts any number of folders.
        class_map: a mapping, a JSON file {folder: index}, or a text file with one folder a line.

    Raises:
        DataError: when folders and head do not fit, or the map is malformed or lacks a folder.
    """
    if class_map is not None:
        indices, where = _read_class_map(class_map), "the class map"
    elif num_classes == IMAGENET_CLASSES and all(WNID.fullmatch(name) for name in folders):
        from timm.data.imagenet_info import ImageNetInfo

        indices = {name: i for i, name in enumerate(cast("Any", ImageNetInfo()).label_names())}
        where = "the 1,000 ImageNet classes"
    else:
        if num_classes is not None and len(folders) != num_classes:
            raise DataError(
                f"{root} has {len(folders)} class folders, but the model has {num_classes} classes.",
                "Say which class each folder is with --class-map (one folder name a line, in class "
                'order, or JSON {"folder": index}).',
            )
        return {name: i for i, name in enumerate(folders)}
    for name in folders:
        if name not in indices:
            raise DataError(
                f"Class folder {name} of {root} is not in {where}.",
                "Add it to --class-map, or remove the folder.",
            )
        index = indices[name]
        if index < 0 or (num_classes is not None and index >= num_classes):
            allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
            raise DataError(
                f"Class folder {name} has index {index}, which is not {allowed}.",
                "Correct --class-map.",
            )
    return indices


def _read_class_map(source: str | os.PathLike[str] | Mapping[str, int]) -> dict[str, int]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    form = 'Write one class folder a line, in class order, or JSON {"folder": index}.'
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Class map {path} cannot be read: {error}.", form) from None
    if text.lstrip().startswith("{"):
        try:
            indices = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"Class map {path} is not valid JSON: {error}.", form) from None
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices.values()):
            raise DataError(f"Class map {path} has an index that is not an integer.", form)
        return dict(indices)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Published ImageNet lists describe each synset on its line: "n01440764 tench, Tinca tinca".
    lines = [line.split()[0] if WNID.fullmatch(line.split()[0]) else line for line in lines]
    if len(set(lines)) < len(lines):
        twice = next(line for i, line in enumerate(lines) if line in lines[:i])
        raise DataError(f"Class map {path} names {twice} twice.", form)
    return {name: i for i, name in enumerate(lines)}


def _extensions() -> set[str]:
    from timm.data.readers import img_extensions
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return {*cast("Any", img_extensions).get_img_extensions(), *IMG_EXTENSIONS}


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}.", "Correct the folder's permissions."
    ) from None
