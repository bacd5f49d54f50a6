"""Sources of images in Python and on disk: folders, the digits, torch datasets, iterables of tensors."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ..digits import NUM_CLASSES as NUM_DIGITS
from ..digits import Split, digit_images, split_indices
from ..errors import DataError, UsageError
from ..preprocessing import Preprocessing
from .folders import class_indices, list_images
from .imageset import (
    UNLABELED,
    ImageSet,
    Memory,
    Transform,
    UnreadableImageError,
    check_labels,
    decode,
    numbers,
    picture_identity,
    transform_of,
)

ClassMap = str | os.PathLike[str] | Mapping[str, int]


class _Files:
    decodes = True

    def __init__(self, paths: list[Path], labels: list[int], transform: Transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def read(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        return self.transform(decode(path, str(path))), self.labels[index]

    def identity(self, index: int) -> str:
        return os.path.realpath(self.paths[index])


def open_folder(
    root: Path,
    preprocessing: Preprocessing | None,
    num_classes: int | None,
    class_map: ClassMap | None,
) -> ImageSet:
    names, folders = list_images(root)
    indices = class_indices(root, folders, num_classes, class_map) if folders else {}
    labels = [indices[name.partition("/")[0]] if folders else UNLABELED for name in names]
    class_names = {i: name for name, i in indices.items()}
    paths = [root / name for name in names]
    for i, path in enumerate(paths):
        try:
            decode(path, str(path))
            break
        except UnreadableImageError as error:
            if i == len(paths) - 1:
                raise DataError(
                    f"None of the {len(paths)} images of {root} is readable; the last: "
                    f"{error.message}",
                    "Check that the files are images and may be read.",
                ) from None
    return ImageSet(
        _Files(paths, labels, transform_of(preprocessing)),
        source=str(root),
        names=names,
        labels=labels,
        labeled=bool(folders),
        class_names=[class_names.get(i, "") for i in range(max(class_names, default=-1) + 1)],
    )


class _Digits:
    decodes = True

    def __init__(
        self, grey: Any, labels: list[int], transform: Transform, numbers: Sequence[int]
    ) -> None:
        self.grey, self.labels, self.transform, self.numbers = grey, labels, transform, numbers

    def read(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.grey[index]).convert("RGB")), self.labels[index]

    def identity(self, index: int) -> str:
        return f"digit {self.numbers[index]}"  # of the whole set


def open_digits(data: str, preprocessing: Preprocessing | None, split: str) -> ImageSet:
    part = data.partition(":")[2] or ("train" if split == "train" else "test")
    if part not in ("train", "test"):
        raise UsageError(f"The digits have no split {part}.", "Use digits:train or digits:test.")
    chosen: Split = "train" if part == "train" else "test"
    grey, targets = digit_images(chosen)
    labels = [int(label) for label in targets]
    return ImageSet(
        _Digits(grey, labels, transform_of(preprocessing), split_indices(chosen)),
        source=f"digits:{part}",
        names=[str(i) for i in split_indices(chosen)],
        labels=labels,
        class_names=[str(i) for i in range(NUM_DIGITS)],
    )


class _Dataset:
    decodes = False  # it may hold what cannot be shared with other processes

    def __init__(
        self,
        dataset: Dataset[Any],
        transform: Transform | None,
        num_classes: int | None,
        origin: str | None,
    ) -> None:
        self.dataset, self.transform, self.num_classes = dataset, transform, num_classes
        self.origin = origin

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = _split_item(self.dataset[index])
        number = UNLABELED if label is None else as_label(label)
        check_labels((number,), self.num_classes, type(self.dataset).__name__)
        return _as_input(image, self.transform, dims=(3,)), number

    def identity(self, index: int) -> str:
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        samples = getattr(dataset, "samples", None)  # of torchvision's folders
        if isinstance(samples, list) and isinstance(samples[index][0], str):
            return str(os.path.realpath(samples[index][0]))
        return f"{self.origin or f'{type(dataset).__name__} {id(dataset)}'} {index}"


def open_dataset(
    dataset: Dataset[Any],
    preprocessing: Preprocessing | None,
    num_classes: int | None,
    *,
    source: str | None = None,
    origin: str | None = None,
) -> ImageSet:
    """Images of a dataset in Python.

    Args:
        source, origin: how the user named it, and what is the same for it under any name, where it has names.
    """
    size = len(cast("Sequence[Any]", dataset))
    source = source or type(dataset).__name__
    if not size:
        raise DataError(f"{source} has no images.", "Give a dataset that is not empty.")
    transform = preprocessing.transform() if preprocessing else None
    reader = _Dataset(dataset, transform, num_classes, origin)
    labeled = reader.read(0)[1] != UNLABELED
    targets = _targets(dataset) if labeled else None
    return ImageSet(
        reader,
        source=source,
        names=numbers(size),
        labels=None if targets is None else [as_label(target) for target in targets],
        labeled=labeled,
        class_names=[str(name) for name in getattr(dataset, "classes", None) or ()],
    )


def _targets(dataset: Any) -> list[Any] | None:
    """Labels of a dataset that can be had without reading its images."""
    if isinstance(dataset, Subset):
        whole = _targets(dataset.dataset)
        return None if whole is None else [whole[i] for i in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors[1])
    targets = getattr(dataset, "targets", None)
    # A target transform would make them other numbers than the items carry.
    changed = getattr(dataset, "target_transform", None) is not None
    return None if targets is None or changed else list(targets)


def open_iterable(data: Iterable[Any], preprocessing: Preprocessing | None) -> ImageSet:
    from PIL import Image

    transform = preprocessing.transform() if preprocessing else None
    source, kept = type(data).__name__, Memory()
    for item in data:
        image, label = _split_item(item)
        x = _as_input(image, transform, dims=(3, 4))
        batch = list(x) if x.ndim == 4 else [x]
        given = label.tolist() if hasattr(label, "tolist") else label
        values = list(given) if isinstance(given, Sequence) else [given] * (given is not None)
        if label is not None and len(values) != len(batch):
            raise DataError(
                f"{source} gave {len(values)} labels with {len(batch)} images.",
                "Give one class index for each image.",
            )
        labels = [as_label(v) for v in values] or [UNLABELED] * len(batch)
        own = picture_identity(image) if isinstance(image, Image.Image) else None
        bounded = not isinstance(data, Sequence | Tensor)
        kept.add(batch, labels, identity=own, bounded=bounded)
    if not kept.images:
        raise DataError(
            f"{source} gave no images.", "An iterator can be read once only; give a list."
        )
    return kept.image_set(source, numbers(len(kept.images)))


def _split_item(item: Any) -> tuple[Any, Any]:
    if isinstance(item, tuple | list):
        return (item[0], item[1]) if len(item) > 1 else (item[0], None)
    return item, None


def _as_input(image: Any, transform: Transform | None, dims: tuple[int, ...]) -> Tensor:
    from PIL import Image

    if isinstance(image, Image.Image) and transform is not None:
        return transform(image.convert("RGB"))
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim in dims:
        return image.detach()
    what = type(image).__name__
    if isinstance(image, Tensor):
        what = f"{image.dtype} tensor of shape {tuple(image.shape)}"
    raise DataError(
        f"A {what} is not an image a model takes.",
        "Give preprocessed float tensors (3, H, W) or batches of them, or PIL images with a "
        "preprocessing.",
    )


def as_label(label: Any) -> int:
    try:
        return operator.index(label)
    except TypeError:
        raise DataError(
            f"A label is a {type(label).__name__}, not one class index.",
            "Give one integer for each image.",
        ) from None
