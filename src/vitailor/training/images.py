"""Training images in an order, and with augmentation, that depend on nothing but seed, epoch and image.

Neither the number of worker processes nor that of training processes changes what is seen, and any epoch
can be entered in the middle.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import ImageSet
from ..preprocessing import Preprocessing
from .config import TrainConfig

if TYPE_CHECKING:
    from PIL.Image import Image

#: Epoch and index of an image.
Key = tuple[int, int]


class Augmentation(Preprocessing):
    """A preprocessing whose transform also augments files, as a `TrainConfig` says; flips are made later,
    on tensors of any source."""

    scale: tuple[float, float] | None
    rand_augment: str | None
    random_erasing: float

    @classmethod
    def of(cls, preprocessing: Preprocessing, config: TrainConfig) -> Augmentation:
        known = {name: getattr(preprocessing, name) for name in Preprocessing.model_fields}
        own = {name: getattr(config, name) for name in ("scale", "rand_augment", "random_erasing")}
        return cls(**known, **own)

    def transform(self) -> Callable[[Image], Tensor]:
        """PIL image to float32 tensor of shape `input_size`, at random."""
        if not (self.scale or self.rand_augment or self.random_erasing):
            return super().transform()
        from timm.data.transforms_factory import create_transform

        return cast(
            "Callable[[Image], Tensor]",
            create_transform(
                input_size=self.input_size,
                is_training=True,
                # Without a scale: resize the shorter side, then crop the middle.
                train_crop_mode="rrc" if self.scale else "rkrc",
                scale=self.scale or (1.0, 1.0),
                ratio=(3 / 4, 4 / 3) if self.scale else (1.0, 1.0),
                hflip=0.0,
                color_jitter=None,  # type: ignore[arg-type]  # at 0 there would be one, drawing numbers
                auto_augment=self.rand_augment,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=self.random_erasing,
                re_mode="pixel",
            ),
        )


def reseed(*key: int) -> None:
    """Set every global generator by a key of non-negative integers."""
    word = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)  # noqa: NPY002 - timm draws from the global generator
    if torch.cuda.is_initialized():
        torch.manual_seed(word)
    else:  # otherwise every call is kept, with its traceback, for a GPU that is not there
        torch.default_generator.manual_seed(word)


class Seeded(Dataset[tuple[Tensor, int, int]]):
    """Items (image, label, view) of an image set, each drawn by its key alone.

    A view is 2 * index, plus 1 where the image is flipped left to right, which happens at the rate
    `hflip`.
    """

    def __init__(self, images: ImageSet, seed: int, hflip: float = 0.0) -> None:
        self.images, self.seed, self.hflip = images, seed, hflip

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        reseed(self.seed, *key)
        flipped = random.random() < self.hflip  # first, so that transforms do not change it
        image, label = self.images[key[1]]
        return image.flip(-1) if flipped else image, label, 2 * key[1] + flipped


class GlobalBatches(Sampler[list[Key]]):
    """This process's share of each global batch of an epoch, from a given update on.

    Images come in a random order; the last batch is filled up from the epoch's beginning, so that all
    batches are full. Each global batch is cut into `accumulate` parts and each part into one share for
    each process: together they see the same images for an update whatever their number.

    Args:
        count: number of images.
        batch_size: of a global batch; a multiple of `accumulate` times `processes`.
        first: the update to begin at.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        processes: int,
        seed: int,
        epoch: int,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.share = batch_size // (accumulate * processes)
        self.updates = -(-count // batch_size)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        self.order = np.resize(order, self.updates * batch_size).tolist()
        self.epoch, self.rank, self.processes, self.first = epoch, rank, processes, first
        self.accumulate, self.batch_size = accumulate, batch_size

    def __len__(self) -> int:
        return (self.updates - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.share * self.processes
        for start in range(self.first * self.batch_size, len(self.order), part):
            mine = start + self.rank * self.share
            yield [(self.epoch, index) for index in self.order[mine : mine + self.share]]


def batches(
    images: ImageSet,
    config: TrainConfig,
    rank: int,
    processes: int,
    epoch: int,
    first: int,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
    """Batches (images (B, 3, H, W), labels (B,), views (B,)) of one process for the rest of an epoch."""
    sampler = GlobalBatches(
        len(images),
        config.batch_size,
        config.accumulate,
        rank,
        processes,
        config.seed,
        epoch,
        first,
    )
    return DataLoader(
        cast("Dataset[Any]", Seeded(images, config.seed, config.hflip)),
        batch_sampler=sampler,
        num_workers=workers,
        generator=torch.Generator(),
    )
