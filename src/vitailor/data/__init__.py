"""Images for calibration, training and evaluation: folders, timm datasets, the digits, or tensors."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import DataError, UsageError
from ..preprocessing import Preprocessing, resolve_preprocessing
from .imageset import ImageSet, UnreadableImageError, check_labels
from .sources import ClassMap, open_dataset, open_digits, open_folder, open_iterable
from .timm_datasets import PREFIXES, open_timm

__all__ = [
    "ClassMap",
    "Data",
    "ImageSet",
    "Preprocessing",
    "UnreadableImageError",
    "loader",
    "open_images",
    "readers",
    "resolve_preprocessing",
]

#: More seldom help one accelerator.
MAX_READERS = 8
#: Where processes hand images over, and the bytes that this takes with batches of a hundred; containers often have less.
SHARED, LEAST_SHARED = Path("/dev/shm"), 2 * 2**30

Data = str | os.PathLike[str] | Dataset[Any] | Iterable[Any]


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
    is_timm = isinstance(data, str) and data.startswith(PREFIXES) and not path.exists()
    if class_map is not None and (not named or is_digits or is_timm):
        raise UsageError("A class map goes with an image folder only.", "Leave --class-map out.")
    if isinstance(data, ImageSet):
        found = data
    elif is_digits:
        found = open_digits(str(data), preprocessing, split)
    elif is_timm:
        found = open_timm(str(data), preprocessing, split, images, seed)
    elif named:
        found = open_folder(path, preprocessing, num_classes, class_map)
    elif _is_map_style(data):
        found = open_dataset(cast("Dataset[Any]", data), preprocessing, num_classes)
    elif isinstance(data, Iterable):
        found = open_iterable(data, preprocessing)
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
    check_labels(found.labels, num_classes, found.source)
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


def readers(images: ImageSet, device: torch.device, workers: int | None = None) -> int:
    """How many processes should read images while a device computes, unless `workers` says so.

    None for a CPU, whose cores are at work. An accelerator would wait for a single reader: it gets up to
    `MAX_READERS` of this machine's cores, a fair share of them for each process of a training. But none for a
    dataset of the user's, which may hold what other processes cannot have; where processes are not forked, since
    a script would be run again in each; where they have little memory to hand images over in; and in a process
    that may have none of its own.
    """
    if workers is not None:
        return workers
    methods = torch.multiprocessing
    method = methods.get_start_method(allow_none=True) or methods.get_all_start_methods()[0]
    if device.type == "cpu" or not images.decodes or method != "fork" or not _may_share():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_READERS, max(1, share))


def _may_share() -> bool:
    """Whether this process may have others, and shared memory to speak of."""
    if multiprocessing.current_process().daemon:
        return False
    return not SHARED.is_dir() or shutil.disk_usage(SHARED).free >= LEAST_SHARED


def _is_map_style(data: Any) -> bool:
    random_access = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and random_access
