"""What training tells of itself: where it stands, how fast it is, and what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """Where training stands, after an update or, with `top1`, after an epoch's validation.

    Attributes:
        epoch, epochs: the present one, counted from 1, and how many; 0 while the teacher's outputs are
            collected beforehand.
        update, updates: of this epoch.
        loss: mean over the epoch so far.
        lr: of the weights.
        images_per_s: over all processes, since the start of this run.
        seconds_left: at that speed.
        top1: on the validation images, in percent.
        observed: after an epoch, what the caller wanted looked at.
    """

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    lr: float
    images_per_s: float
    seconds_left: float
    top1: float | None = None
    observed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What came out of training.

    Attributes:
        epochs: how many were done in all.
        losses: mean loss of each epoch.
        top1: validation accuracy after each epoch, in percent; empty without validation images.
        images_per_s: over all processes, validation apart.
    """

    epochs: int
    losses: tuple[float, ...]
    top1: tuple[float, ...]
    images_per_s: float


class Meter:
    """Images and seconds of training: in all, and since this run began, which is what a forecast is made of.

    Attributes:
        seen, seconds: in all, of runs that were interrupted too.
    """

    def __init__(self, seen: int = 0, seconds: float = 0.0) -> None:
        self.seen, self.seconds = seen, seconds
        self._seen_before, self._seconds_before = seen, seconds

    def add(self, images: int, seconds: float) -> None:
        self.seen += images
        self.seconds += seconds

    @property
    def overall(self) -> float:
        """Images per second in all; 0 before any."""
        return self.seen / self.seconds if self.seconds else 0.0

    @property
    def speed(self) -> float:
        """Images per second since this run began; 0 before any."""
        seconds = self.seconds - self._seconds_before
        return (self.seen - self._seen_before) / seconds if seconds else 0.0

    def seconds_for(self, images: int) -> float:
        """How long so many more will take at this speed."""
        return images / self.speed if self.speed else math.inf
