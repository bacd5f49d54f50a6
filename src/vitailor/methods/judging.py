"""Images that candidates of a search are judged on, apart from those that anything else is done with."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ..data import ImageSet
from ..errors import DataError
from .base import Task

#: So many, or this share of the calibration images, unless told otherwise.
IMAGES, SHARE = 256, 0.5


def split(task: Task, wanted: int | None) -> tuple[ImageSet, ImageSet]:
    """Images to calibrate on, and others to judge candidates by.

    Args:
        wanted: how many of the latter, drawn by seed; None for `IMAGES`, at most `SHARE` of what there is.

    Raises:
        DataError: when none is left to calibrate on.
    """
    if task.data is None:
        raise DataError("There are no calibration images.", "Pass data=, or --calibrate.")
    images = task.data
    if task.reward is not None:
        few = min(wanted or IMAGES, len(task.reward))
        judged = task.reward.draw(few, task.seed) if few < len(task.reward) else task.reward
    else:
        most = len(images) if wanted else max(1, int(len(images) * SHARE))
        judged = images.draw(min(wanted or IMAGES, most), task.seed)
    rest = without(images, judged)
    if not len(rest):
        raise DataError(
            f"All {len(images)} images judge candidates, and none is left to calibrate on.",
            "Give more images, or fewer reward_images.",
        )
    return rest, judged


def without(images: ImageSet, others: ImageSet) -> ImageSet:
    """The images that are not among the others, however their folder is spelled."""
    taken = set(_identities(others))
    return images.subset(i for i, one in enumerate(_identities(images)) if one not in taken)


def _identities(images: ImageSet) -> list[str]:
    """What is the same for the same image: the file, or the source and the name."""
    root = Path(images.source)
    if root.is_dir():
        whole = root.resolve()
        return [str(whole / name) for name in images.names]
    return [f"{images.source}\n{name}" for name in images.names]


def fingerprint(images: ImageSet) -> str:
    """Tells sets of images apart: by their names, and by how the first looks, which tells of preprocessing."""
    first = images[0][0].float().contiguous()
    return f"{images.list_hash} {sha256(first.numpy().tobytes()).hexdigest()}"
