"""timm's datasets (hfds/..., wds/..., torch/...), opened by timm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import DataError
from ..preprocessing import Preprocessing
from .imageset import (
    UNLABELED,
    ImageSet,
    Memory,
    Transform,
    decode,
    draw_positions,
    numbers,
    picture_identity,
    transform_of,
)
from .sources import as_label, open_dataset

PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


class _Timm:
    """Items of a timm reader. timm's own dataset would put the next image in place of a broken one."""

    decodes = True

    def __init__(
        self, reader: Any, labels: list[int], source: str, origin: str, transform: Transform
    ) -> None:
        self.reader, self.labels, self.source, self.origin = reader, labels, source, origin
        self.transform = transform

    def read(self, index: int) -> tuple[Tensor, int]:
        with self.reader[index][0] as file:
            image = decode(file, f"Image {index} of {self.source}")
        return self.transform(image), self.labels[index]

    def identity(self, index: int) -> str:
        return f"{self.origin} {index}"


def open_timm(
    data: str, preprocessing: Preprocessing | None, split: str, images: int | None, seed: int
) -> ImageSet:
    name, _, root = data.partition("@")
    name, _, part = name.partition(":")
    part = part or split
    # However it was spelled; what is read into memory is told apart by its content.
    origin = f"{name}:{part}@{Path(root or '.').resolve()}"
    transform = transform_of(preprocessing)
    try:
        from timm.data.dataset_factory import create_dataset

        # Missing packages are reported with print(), and stdout belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            dataset: Any = create_dataset(
                name, root=root or (None if name.startswith("hf") else "."), split=part
            )
    # Readers raise whatever the library beneath them does, plain asserts included.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"timm cannot open {data}: {reason}",
            "Write NAME:SPLIT@FOLDER, with FOLDER where the dataset lies, and install what it needs.",
        ) from None
    if isinstance(dataset, IterableDataset):
        return open_stream(dataset, data, transform, images, seed)
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return open_dataset(dataset, preprocessing, None, source=data, origin=origin)
    labels = [UNLABELED if t is None else as_label(t) for t in reader.iter_targets()]
    indices = getattr(reader, "class_to_idx", None) or {}
    return ImageSet(
        _Timm(reader, labels, data, origin, transform),
        source=data,
        names=numbers(len(labels)),
        labels=labels,
        labeled=UNLABELED not in labels,
        class_names=sorted(indices, key=lambda name: int(indices[name])),
    )


def open_stream(
    dataset: Iterable[Any], source: str, transform: Transform, images: int | None, seed: int
) -> ImageSet:
    """Read a dataset without random access into memory: one pass for the labels, one for the images."""
    labels = [as_label(target) for _, target in dataset]
    names = numbers(len(labels))
    chosen = (
        range(len(names)) if images is None else draw_positions(names, labels, images, seed, source)
    )
    wanted, kept = set(chosen), Memory()
    for i, (image, target) in enumerate(dataset):
        if i in wanted:
            picture = image.convert("RGB")
            identity = picture_identity(picture)
            kept.add([transform(picture)], [as_label(target)], identity=identity)
    return kept.image_set(source, [names[i] for i in chosen])
