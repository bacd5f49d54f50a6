"""Images that candidates of a search are judged on, apart from those that anything else is done with."""

from __future__ import annotations

from hashlib import sha256

from ..data import ImageSet
from ..data.imageset import draw_positions
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
        # Others than those to calibrate on, where there are enough.
        others = without(task.reward, images)
        pool = others if len(others) >= few else task.reward
        judged = pool.draw(few, task.seed) if few < len(pool) else pool
        rest = without(images, judged)
    else:
        most = len(images) if wanted else max(1, int(len(images) * SHARE))
        few = min(wanted or IMAGES, most)
        drawn = draw_positions(images.names, images.labels, few, task.seed, images.source)
        judged = images.subset(drawn)
        rest = images.subset(sorted(set(range(len(images))) - set(drawn)))
    if not len(rest):
        raise DataError(
            f"All {len(images)} images judge candidates, and none is left to calibrate on.",
            "Give more images, or fewer reward_images.",
        )
    return rest, judged


def without(images: ImageSet, others: ImageSet) -> ImageSet:
    """The images that are not among the others, as far as their identities tell."""
    taken = set(others.identities)
    return images.subset(i for i, one in enumerate(images.identities) if one not in taken)


def fingerprint(images: ImageSet) -> str:
    """Tells sets of images apart: by their names, or in memory by their content, and by how the first looks, which
    tells of preprocessing."""
    shown = images[0][0].float().contiguous().numpy().tobytes()
    content = "\n".join(images.identities).encode() if images.in_memory else b""
    return f"{images.list_hash} {sha256(content + shown).hexdigest()}"
