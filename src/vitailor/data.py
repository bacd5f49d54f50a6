"""Images for calibration, training and evaluation: folders, timm datasets, the digits, or tensors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from .digits import NUM_CLASSES as NUM_DIGITS
from .digits import digit_images
from .errors import DataError, UsageError
from .folders import class_indices, list_images
from .preprocessing import Preprocessing, resolve_preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Data", "ImageSet", "Preprocessing", "loader", "open_images", "resolve_preprocessing"]

Data = str | os.PathLike[str] | Dataset[Any] | Iterable[Any]
ClassMap = str | os.PathLike[str] | Mapping[str, int]
Transform = Callable[["Image"], Tensor]

UNLABELED = -1
MAX_BYTES_IN_MEMORY = 4 * 2**30  # what an iterable may fill: about 7,000 images of 224 px in float32
TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


class UnreadableImageError(DataError):
    """A file that is not the image its name promises.

    A DataLoader rebuilds a worker's exception in the main process as `type(text)`, where text is a
    whole traceback. The last line of that is the message; keeping only it leaves the same error,
    whatever the number of workers and whoever made the DataLoader.
    """

    def __init__(self, message: str, fix: str = "Replace or remove the file.") -> None:
        last = message.rstrip().rpartition("\n")[2]
        if last != message:
            message = last.partition(": ")[2].removesuffix(fix).rstrip()
        super().__init__(message, fix)


class Reader(Protocol):
    """Where the images of an `ImageSet` come from."""

    def read(self, index: int) -> tuple[Tensor, int]:
        """An image as a model takes it, and its label (-1: none)."""


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images in a fixed order: item i is (image tensor, label), with label -1 where there is none.

    Attributes:
        source: where the images come from, as the user named it.
        names: what tells the images apart, in order: relative path or index.
        labels: class index of each; -1 where there is none, or none is known before it is read.
        labeled: whether the images have labels.
        class_names: name of each class index, where known, else empty.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        source: str,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        labeled: bool = True,
        class_names: Sequence[str] = (),
        indices: Sequence[int] | None = None,
    ) -> None:
        self._reader = reader
        self._indices = tuple(range(len(names)) if indices is None else indices)
        self.source = source
        self.names = tuple(names)
        self.labels = (UNLABELED,) * len(names) if labels is None else tuple(labels)
        self.labeled = labeled
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._reader.read(self._indices[index])

    @property
    def num_images(self) -> int:
        return len(self)

    @cached_property
    def list_hash(self) -> str:
        """SHA-256 over the sorted names with their labels."""
        lines = sorted(f"{n}\t{c}\n" for n, c in zip(self.names, self.labels, strict=True))
        return sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def subset(self, positions: Iterable[int]) -> ImageSet:
        """The images at these positions, in the order given."""
        chosen = list(positions)
        return ImageSet(
            self._reader,
            source=self.source,
            names=[self.names[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            labeled=self.labeled,
            class_names=self.class_names,
            indices=[self._indices[i] for i in chosen],
        )

    def draw(self, images: int, seed: int = 0) -> ImageSet:
        """So many images, spread over the classes as equally as possible, in their old order.

        Raises:
            DataError: when there are not so many.
        """
        return self.subset(_draw(self.names, self.labels, images, seed, self.source))


def open_images(
    data: Data,
    preprocessing: Preprocessing | None,
    *,
    num_classes: int | None = None,
    class_map: ClassMap | None = None,
    images: int | None = None,
    seed: int = 0,
    labels_needed: bool = False,
    split: str = "validation",
) -> ImageSet:
    """Open images without reading them all.

    Args:
        data: an image folder (class subfolders; without them unlabeled); a timm dataset name
            `hfds/...`, `wds/...` or `torch/...`, with `:SPLIT` and `@FOLDER` appended where needed;
            `digits`, `digits:train` or `digits:test`; a torch `Dataset` of images or (image, label);
            or an iterable of float tensors (B, 3, H, W) or (3, H, W), or of (images, labels).
            Tensors are taken as preprocessed; iterables are read into memory, up to 4 GiB.
        preprocessing: how images become tensors; may be None where `data` gives tensors.
        num_classes: outputs of the model's head; None where labels are not compared with outputs.
        class_map: class index of each class folder, see `folders.class_indices`.
        images: draw so many by seed, spread over the classes; the same ones on every machine. A
            `Dataset` that has no `targets` is drawn without regard to classes.
        split: which part of a dataset that `data` names without saying so: "train" or "validation".

    Raises:
        DataError: when there are no images, too few, none that is readable, no labels where they are
            needed, or labels the head does not have. An image that turns out unreadable later raises
            it when it is read.
        UsageError: when an argument is out of range or does not go with this kind of data.
    """
    if images is not None and images < 1:
        raise UsageError(f"Cannot draw {images} images.", "Draw at least one.")
    named = isinstance(data, str | os.PathLike)
    path = Path(data) if isinstance(data, str | os.PathLike) else Path()
    is_digits = isinstance(data, str) and data.partition(":")[0] == "digits"
    is_timm = isinstance(data, str) and data.startswith(TIMM_PREFIXES) and not path.exists()
    if class_map is not None and (not named or is_digits or is_timm):
        raise UsageError("A class map goes with an image folder only.", "Leave --class-map out.")
    if isinstance(data, ImageSet):
        found = data
    elif is_digits:
        found = _open_digits(str(data), preprocessing, split)
    elif is_timm:
        found = _open_timm(str(data), preprocessing, split, images, seed)
    elif named:
        found = _open_folder(path, preprocessing, num_classes, class_map)
    elif _is_map_style(data):
        found = _open_dataset(cast("Dataset[Any]", data), preprocessing, num_classes)
    elif isinstance(data, Iterable):
        found = _open_iterable(data, preprocessing)
    else:
        raise DataError(
            f"{type(data).__name__} is not a source of images.",
            "Give a path, a torch Dataset, or an iterable of image tensors.",
        )
    if images is not None and images != len(found):
        found = found.draw(images, seed)
    if labels_needed and not found.labeled:
        raise DataError(
            f"{found.source} has no labels, which are needed here.",
            "Sort the images into one folder per class, or give (images, labels).",
        )
    _check_labels(found.labels, num_classes, found.source)
    return found


def loader(data: Data, *, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """Batches (images (B, 3, H, W), labels (B,) int64), in order, the last one as small as it comes.

    The global random state is not touched.

    Args:
        data: an `ImageSet`, or tensors as `open_images` takes them.
        workers: processes that read images; 0 reads in this one.
    """
    image_set = open_images(data, None)
    # Iterating draws a seed for workers, by default from torch's global generator.
    return DataLoader(
        image_set, batch_size=batch_size, num_workers=workers, generator=torch.Generator()
    )


def _draw(
    names: Sequence[str], labels: Sequence[int], images: int, seed: int, source: str
) -> list[int]:
    """Positions of the drawn images, ascending.

    Ranks are hashes of seed and name, not of a random generator: a draw is the same under every version
    of every library, a larger draw contains a smaller one, and other classes do not change a class's.
    """
    if images > len(names):
        raise DataError(
            f"{source} has {len(names)} images, fewer than the {images} to be drawn.",
            "Draw fewer images, or add some.",
        )

    def rank(*what: str) -> bytes:
        return sha256("\0".join((str(seed), *what)).encode("utf-8", "surrogateescape")).digest()

    groups: dict[str, list[int]] = {}
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        # Folders, not labels: a draw does not depend on how folders are numbered.
        folder, inside, _ = name.partition("/")
        groups.setdefault(folder if inside else str(label), []).append(i)
    order = [
        (turn, rank("class", group), i)
        for group, members in groups.items()
        for turn, i in enumerate(sorted(members, key=lambda i: rank("image", names[i])))
    ]
    return sorted(i for _, _, i in sorted(order)[:images])


def _check_labels(labels: Iterable[int], num_classes: int | None, source: str) -> None:
    top = max(labels, default=UNLABELED)
    if num_classes is not None and top >= num_classes:
        raise DataError(
            f"{source} has label {top}, but the model has {num_classes} classes "
            f"(0 to {num_classes - 1}).",
            "Use images of the model's classes, or a model with a head for these.",
        )


# -- folders and the digits ----------------------------------------------------------------------


class _Files:
    def __init__(self, paths: list[Path], labels: list[int], transform: Transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def read(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        return self.transform(_decode(path, str(path))), self.labels[index]


def _decode(file: Path | IO[bytes], name: str) -> Image:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    # Decoders raise many types on bad bytes, struct.error and SyntaxError among them.
    except Exception as error:
        message = f"{name} cannot be read as an image: {error}."
        raise UnreadableImageError(" ".join(message.split())) from None


def _open_folder(
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
            _decode(path, str(path))
            break
        except UnreadableImageError as error:
            if i == len(paths) - 1:
                raise DataError(
                    f"None of the {len(paths)} images of {root} is readable; the last: "
                    f"{error.message}",
                    "Check that the files are images and may be read.",
                ) from None
    return ImageSet(
        _Files(paths, labels, _transform(preprocessing)),
        source=str(root),
        names=names,
        labels=labels,
        labeled=bool(folders),
        class_names=[class_names.get(i, "") for i in range(max(class_names, default=-1) + 1)],
    )


class _Digits:
    def __init__(self, grey: Any, labels: list[int], transform: Transform) -> None:
        self.grey, self.labels, self.transform = grey, labels, transform

    def read(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.grey[index]).convert("RGB")), self.labels[index]


def _open_digits(data: str, preprocessing: Preprocessing | None, split: str) -> ImageSet:
    part = data.partition(":")[2] or ("train" if split == "train" else "test")
    if part not in ("train", "test"):
        raise UsageError(f"The digits have no split {part}.", "Use digits:train or digits:test.")
    grey, targets = digit_images("train" if part == "train" else "test")
    labels = [int(label) for label in targets]
    return ImageSet(
        _Digits(grey, labels, _transform(preprocessing)),
        source=f"digits:{part}",
        names=_numbers(len(labels)),
        labels=labels,
        class_names=[str(i) for i in range(NUM_DIGITS)],
    )


# -- Python objects ------------------------------------------------------------------------------


class _Dataset:
    def __init__(
        self, dataset: Dataset[Any], transform: Transform | None, num_classes: int | None
    ) -> None:
        self.dataset, self.transform, self.num_classes = dataset, transform, num_classes

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = _split_item(self.dataset[index])
        number = UNLABELED if label is None else _as_label(label)
        _check_labels((number,), self.num_classes, type(self.dataset).__name__)
        return _as_input(image, self.transform, dims=(3,)), number


def _open_dataset(
    dataset: Dataset[Any], preprocessing: Preprocessing | None, num_classes: int | None
) -> ImageSet:
    size = len(cast("Sequence[Any]", dataset))
    source = type(dataset).__name__
    if not size:
        raise DataError(f"{source} has no images.", "Give a dataset that is not empty.")
    transform = preprocessing.transform() if preprocessing else None
    reader = _Dataset(dataset, transform, num_classes)
    labeled = reader.read(0)[1] != UNLABELED
    targets = _targets(dataset) if labeled else None
    return ImageSet(
        reader,
        source=source,
        names=_numbers(size),
        labels=None if targets is None else [_as_label(target) for target in targets],
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


class _Tensors:
    def __init__(self, images: list[Tensor], labels: list[int]) -> None:
        self.images, self.labels = images, labels

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def _open_iterable(data: Iterable[Any], preprocessing: Preprocessing | None) -> ImageSet:
    transform = preprocessing.transform() if preprocessing else None
    source, kept = type(data).__name__, _Memory()
    for item in data:
        image, label = _split_item(item)
        x = _as_input(image, transform, dims=(3, 4))
        given = [] if label is None else label.tolist() if isinstance(label, Tensor) else label
        values = list(given) if isinstance(given, Sequence) else [given]
        batch = list(x) if x.ndim == 4 else [x]
        if label is not None and len(values) != len(batch):
            raise DataError(
                f"{source} gave {len(values)} labels with {len(batch)} images.",
                "Give one class index for each image.",
            )
        numbers = [_as_label(v) for v in values] or [UNLABELED] * len(batch)
        kept.add(batch, numbers, bounded=not isinstance(data, Sequence | Tensor))
    if not kept.images:
        raise DataError(
            f"{source} gave no images.", "An iterator can be read once only; give a list."
        )
    return kept.image_set(source, _numbers(len(kept.images)))


class _Memory:
    """Images held in memory, all of one size."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        self.bytes = 0

    def add(self, images: list[Tensor], labels: list[int], *, bounded: bool = True) -> None:
        for image in images:
            first = self.images[0] if self.images else image
            if image.shape != first.shape:
                raise DataError(
                    f"Images differ in size: {tuple(first.shape)} and {tuple(image.shape)}.",
                    "Give tensors of one size.",
                )
            self.images.append(image)
            self.bytes += image.numel() * image.element_size()
        self.labels += labels
        if bounded and self.bytes > MAX_BYTES_IN_MEMORY:
            raise DataError(
                f"The images take more than {MAX_BYTES_IN_MEMORY / 2**30:g} GiB of memory.",
                "Give an image folder or a Dataset, or draw fewer with --images.",
            )

    def image_set(self, source: str, names: Sequence[str]) -> ImageSet:
        labeled = [label != UNLABELED for label in self.labels]
        if any(labeled) and not all(labeled):
            raise DataError(
                f"{source} has labels for some images only.", "Label all of them, or none."
            )
        return ImageSet(
            _Tensors(self.images, self.labels),
            source=source,
            names=names,
            labels=self.labels,
            labeled=all(labeled),
        )


# -- timm's datasets -----------------------------------------------------------------------------


class _Timm:
    """Items of a timm reader. timm's own dataset would put the next image in place of a broken one."""

    def __init__(self, reader: Any, labels: list[int], source: str, transform: Transform) -> None:
        self.reader, self.labels, self.source = reader, labels, source
        self.transform = transform

    def read(self, index: int) -> tuple[Tensor, int]:
        file = self.reader[index][0]
        image = _decode(file, f"Image {index} of {self.source}")
        return self.transform(image), self.labels[index]


def _open_timm(
    data: str, preprocessing: Preprocessing | None, split: str, images: int | None, seed: int
) -> ImageSet:
    name, _, root = data.partition("@")
    name, _, part = name.partition(":")
    transform = _transform(preprocessing)
    try:
        from timm.data import create_dataset

        # Missing packages are reported with print(), and stdout belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            dataset: Any = create_dataset(
                name, root=root or (None if name.startswith("hf") else "."), split=part or split
            )
    # Readers raise whatever the library beneath them does, plain asserts included.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"timm cannot open {data}: {reason}",
            "Write NAME:SPLIT@FOLDER, with FOLDER where the dataset lies, and install what it needs.",
        ) from None
    if isinstance(dataset, IterableDataset):
        return _open_stream(dataset, data, transform, images, seed)
    reader = getattr(dataset, "reader", None)
    if reader is None:
        found = _open_dataset(dataset, preprocessing, None)
        found.source = data
        return found
    labels = [UNLABELED if t is None else _as_label(t) for t in reader.iter_targets()]
    indices = getattr(reader, "class_to_idx", None) or {}
    return ImageSet(
        _Timm(reader, labels, data, transform),
        source=data,
        names=_numbers(len(labels)),
        labels=labels,
        labeled=UNLABELED not in labels,
        class_names=sorted(indices, key=lambda name: int(indices[name])),
    )


def _open_stream(
    dataset: Iterable[Any], source: str, transform: Transform, images: int | None, seed: int
) -> ImageSet:
    """Read a dataset without random access into memory: one pass for the labels, one for the images."""
    labels = [_as_label(target) for _, target in dataset]
    names = _numbers(len(labels))
    chosen = range(len(names)) if images is None else _draw(names, labels, images, seed, source)
    wanted, kept = set(chosen), _Memory()
    for i, (image, target) in enumerate(dataset):
        if i in wanted:
            kept.add([transform(image.convert("RGB"))], [_as_label(target)])
    return kept.image_set(source, [names[i] for i in chosen])


# -- one item ------------------------------------------------------------------------------------


def _is_map_style(data: Any) -> bool:
    random_access = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and random_access


def _transform(preprocessing: Preprocessing | None) -> Transform:
    if preprocessing is None:
        raise UsageError("Image files need a preprocessing.", "Pass preprocessing=.")
    return preprocessing.transform()


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


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


def _as_label(label: Any) -> int:
    try:
        return int(label)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"A label is a {type(label).__name__}, not one class index.",
            "Give one integer for each image.",
        ) from None
