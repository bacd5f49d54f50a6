"""A set of images in a fixed order, and what every source of images needs to make one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, UsageError
from ..preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

UNLABELED = -1
# What images held in memory may fill: about 7,000 images of 224 pixels in float32.
MAX_BYTES_IN_MEMORY = 4 * 2**30


class UnreadableImageError(DataError):
    """A file that is not the image its name promises.

    A DataLoader rebuilds a worker's exception in the main process as `type(text)`, where text is a
    whole traceback. The last line of that is the message; keeping only it leaves the same error,
    whatever the number of workers and whoever made the DataLoader.
    """

    def __init__(self, message: str, fix: str = "Replace or remove the file.") -> None:
        if "\n" in message:
            last = message.rstrip().rpartition("\n")[2]
            message = last.partition(": ")[2].removesuffix(fix).rstrip()
        super().__init__(message, fix)


class Reader(Protocol):
    """Where the images of an `ImageSet` come from."""

    #: Whether reading is work of ours, which several processes may share.
    decodes: bool

    def read(self, index: int) -> tuple[Tensor, int]:
        """An image as a model takes it, and its label (-1: none)."""

    def identity(self, index: int) -> str:
        """What is the same for the same image of another set."""


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images in a fixed order: item i is (image tensor, label), with label -1 where there is none.

    Attributes:
        source: where the images come from, as the user named it.
        names: what tells the images apart, in order: relative path or index.
        identities: what is the same for the same image of another set, as far as can be known: a file's real path,
            a data set's place in it, or in memory a hash of the content.
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

    @property
    def in_memory(self) -> bool:
        """Whether images are held in memory, ready for a model."""
        return isinstance(self._reader, _Tensors)

    @property
    def decodes(self) -> bool:
        """Whether reading an image is work of ours, which several processes may share."""
        return self._reader.decodes

    @cached_property
    def list_hash(self) -> str:
        """SHA-256 over the sorted names with their labels; images given as tensors go by number."""
        lines = sorted(f"{n}\t{c}\n" for n, c in zip(self.names, self.labels, strict=True))
        return sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """See the class."""
        return tuple(self._reader.identity(i) for i in self._indices)

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
        return self.subset(draw_positions(self.names, self.labels, images, seed, self.source))


def draw_positions(
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


def check_labels(labels: Iterable[int], num_classes: int | None, source: str) -> None:
    """Raise a `DataError` for a label beyond the head's outputs."""
    top = max(labels, default=UNLABELED)
    if num_classes is not None and top >= num_classes:
        raise DataError(
            f"{source} has label {top}, but the model has {num_classes} classes "
            f"(0 to {num_classes - 1}).",
            "Use images of the model's classes, or a model with a head for these.",
        )


class _Tensors:
    decodes = False

    def __init__(self, images: list[Tensor], labels: list[int], seen: list[str | None]) -> None:
        self.images, self.labels, self.seen = images, labels, seen

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def identity(self, index: int) -> str:
        return (
            self.seen[index]
            or sha256(self.images[index].cpu().float().contiguous().numpy().tobytes()).hexdigest()
        )


def picture_identity(picture: Image) -> str:
    """Of an image before it is made a tensor, which an augmentation may do otherwise each time."""
    return sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


class Memory:
    """Images held in memory, all of one size."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        self.seen: list[str | None] = []
        self.bytes = 0

    def add(
        self,
        images: list[Tensor],
        labels: list[int],
        *,
        identity: str | None = None,
        bounded: bool = True,
    ) -> None:
        """Hold images; `identity` is that of a single one, where it has one of its own."""
        for image in images:
            first = self.images[0] if self.images else image
            if image.shape != first.shape:
                raise DataError(
                    f"Images differ in size: {tuple(first.shape)} and {tuple(image.shape)}.",
                    "Give tensors of one size.",
                )
            self.images.append(image)
            self.seen.append(identity)
            self.bytes += image.numel() * image.element_size()
        self.labels += labels
        if bounded and self.bytes > MAX_BYTES_IN_MEMORY:
            raise DataError(
                f"The images take more than {MAX_BYTES_IN_MEMORY / 2**30:g} GiB of memory.",
                "Give an image folder or a Dataset, or fewer images.",
            )

    def image_set(self, source: str, names: Sequence[str]) -> ImageSet:
        labeled = [label != UNLABELED for label in self.labels]
        if any(labeled) and not all(labeled):
            raise DataError(
                f"{source} has labels for some images only.", "Label all of them, or none."
            )
        return ImageSet(
            _Tensors(self.images, self.labels, self.seen),
            source=source,
            names=names,
            labels=self.labels,
            labeled=all(labeled),
        )


def decode(file: Path | IO[bytes], name: str) -> Image:
    """The RGB image in a file that errors call `name`."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    # Decoders raise many types on bad bytes, struct.error and SyntaxError among them.
    except Exception as error:
        message = f"{name} cannot be read as an image: {error}."
        raise UnreadableImageError(" ".join(message.split())) from None


def transform_of(preprocessing: Preprocessing | None) -> Transform:
    if preprocessing is None:
        raise UsageError("Image files need a preprocessing.", "Pass preprocessing=.")
    return preprocessing.transform()


def numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]
