"""Real images that come with the install: scikit-learn's 1,797 handwritten digits, 8x8 pixels."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split = Literal["train", "test"]
NUM_IMAGES = 1797
TRAIN_IMAGES = 1297
NUM_CLASSES = 10


def split_indices(split: Split) -> list[int]:
    """Indices of a split's images in the whole set, ascending.

    The order that cuts the set in two is that of hashes, not of a random generator: what was learned
    from `train` stays disjoint from `test` under every version of every library.
    """
    order = sorted(
        range(NUM_IMAGES), key=lambda i: sha256(f"vitailor digits {i}".encode()).digest()
    )
    return sorted(order[:TRAIN_IMAGES] if split == "train" else order[TRAIN_IMAGES:])


def digit_images(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of a fixed split: 1,297 for "train", 500 for "test".

    Returns:
        grey levels 0 to 255 (N, 8, 8) and labels 0 to 9 (N,).
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = split_indices(split)
    # The set counts inked pixels of 4x4 cells: 0 to 16.
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return grey, cast("NDArray[np.int64]", digits.target[chosen].astype(np.int64))
