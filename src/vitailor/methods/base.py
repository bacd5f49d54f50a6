"""What all methods share: typed settings in, a smaller model and its plan out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ..budget import Budget, cost
from ..calibrate import Batches
from ..data import ImageSet, loader
from ..errors import BudgetError, DataError, UsageError
from ..plan import Plan
from ..shape import Matching, ViTShape, describe_validation_error, revise
from ..training import Event, TrainConfig

#: Small batches stay in a CPU's cache and are fastest there; a GPU is far from full either way.
BATCH_SIZE = 16
#: Called with how much is done and how much there is in all.
Progress = Callable[[int, int], None]
#: Called with the name of a stage of training, and where it stands.
OnEvent = Callable[[str, Event], None]
#: Called with how many candidates were judged, how many there are to be, and the best reward so far.
OnTrial = Callable[[int, int, float], None]
#: Measures latency in milliseconds of several models side by side, the dense one first.
Stopwatch = Callable[[list[nn.Module]], list[float]]


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        model: the dense model, in eval mode on the device to work on; not to be changed.
        shape: its shape.
        budget: never to be exceeded.
        data: calibration images; None where the method needs none and none were given.
        device: where the model is.
        stopwatch: for latency budgets.
        seed: of everything random.
        progress: tells how far the work is.
        train: training images, for methods that train.
        reward: images that candidates of a search are judged on; None for some of `data`.
        on_trial: told about each candidate of a search.
        folder: for checkpoints; None for none.
        resume: go on from checkpoints that are there.
        on_event: told about training: the stage's name, and where it stands.
        teacher: what is distilled from; None for `model`.
    """

    model: nn.Module
    shape: ViTShape
    budget: Budget
    data: ImageSet | None
    device: torch.device
    stopwatch: Stopwatch
    seed: int
    progress: Progress
    train: ImageSet | None = None
    reward: ImageSet | None = None
    on_trial: OnTrial | None = None
    folder: Path | None = None
    resume: bool = False
    on_event: OnEvent | None = None
    teacher: nn.Module | None = None

    @property
    def taught_by(self) -> nn.Module:
        return self.model if self.teacher is None else self.teacher

    def batches(self, limit: int | None = None, size: int = BATCH_SIZE) -> Batches:
        """Calibration images in batches of `size`: all, or at most `limit`, drawn by seed."""
        if self.data is None:
            raise DataError("There are no calibration images.", "Pass data=, or --calibrate.")
        images = self.data
        if limit is not None and limit < len(images):
            images = images.draw(limit, self.seed)
        dtype = next(self.model.parameters()).dtype
        return _Cast(loader(images, batch_size=size), dtype)


@dataclass(frozen=True)
class _Cast:
    """Batches in the model's precision."""

    batches: Iterable[tuple[Tensor, Tensor]]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield images.to(self.dtype), labels


@dataclass(frozen=True)
class Outcome:
    """What a method gives back.

    Attributes:
        model: the smaller model.
        plan: relative to the dense one.
        facts: worth recording.
        whole: False after an early stage, whose model is not cut yet.
    """

    model: nn.Module
    plan: Plan
    facts: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


class Method(BaseModel):
    """Settings of a method: frozen, keyword-only; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            known = ", ".join(type(self).model_fields)
            raise UsageError(
                describe_validation_error(type(self).__name__, error), f"Settings: {known}."
            ) from None

    @property
    def needs_images(self) -> bool:
        """Whether calibration images are needed at all."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether the calibration images must have labels."""
        return False

    @property
    def trains(self) -> TrainConfig | None:
        """Settings of training on a training set; None for a method that needs none."""
        return None

    @property
    def trains_on_labels(self) -> bool:
        """Whether training reads the labels of training images."""
        return self.trains is not None and self.trains.needs_labels

    @property
    def judges_on(self) -> int:
        """On how many images of their own candidates of a search are judged; 0 for a method without a search."""
        return 0

    @property
    def searches(self) -> bool:
        """Whether candidates are judged on images of their own."""
        return self.judges_on > 0

    @property
    def resumable(self) -> bool:
        """Whether there is anything to keep in a folder, so that a run that was cut off goes on."""
        return self.trains is not None

    def check(self, shape: ViTShape, budget: Budget) -> None:
        """Refuse what cannot work before any work starts; nothing to refuse by default."""
        return

    def cuts_tokens(self, budget: Budget) -> bool:
        """Whether blocks may get fewer tokens, which needs a model with a fixed number of them."""
        return False

    def settings(self) -> dict[str, Any]:
        """What is recorded of how a model was made."""
        return self.model_dump(mode="json")

    @abstractmethod
    def plan(self, task: Task) -> Plan:
        """What would be cut, found without building the result."""

    @abstractmethod
    def run(self, task: Task) -> Outcome:
        """Compress."""


def keeps_all(budget: Budget, shape: ViTShape) -> bool:
    """Whether the model is within the budget as it is, which then leaves it as it is."""
    if budget.metric not in ("macs", "params"):
        return False
    return budget.limit(shape) >= cost(shape, budget.metric)


def with_matching(shape: ViTShape, matching: Matching, features: int | None = None) -> ViTShape:
    """The shape with this rule for pairing tokens, compared by so many features (None: all); a model
    that merges already keeps its own."""
    if shape.merges_tokens:
        return shape
    return revise(shape, matching=matching, match_features=features)


def within(
    budget: Budget,
    dense: ViTShape,
    allocate: Callable[[str, int], ViTShape],
    milliseconds: Callable[[list[ViTShape]], list[float]],
) -> ViTShape:
    """The sizes that an allocator finds for a budget of any kind.

    A latency budget that the dense model meets leaves it as it is. Any other is met by bisecting over MACs,
    measuring each candidate on the device at hand beside the dense model.

    Args:
        allocate: (metric, limit) -> shape.
        milliseconds: latencies of models of these shapes, measured side by side.

    Raises:
        BudgetError: when even a very small model misses the budget.
    """
    if budget.metric in ("macs", "params"):
        return allocate(budget.metric, budget.limit(dense))
    if budget.metric == "latency_ms":
        meets = milliseconds([dense])[0] <= budget.value
    else:
        meets = budget.value >= 1
    if meets:
        return dense
    best: ViTShape | None = None
    full: float | None = None
    low, high = 0.02, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        try:
            shape = allocate("macs", int(middle * cost(dense, "macs")))
        except BudgetError:
            low = middle
            continue
        full, got = milliseconds([dense, shape])
        limit = budget.value if budget.metric == "latency_ms" else budget.value * full
        if got <= limit:
            best, low = shape, middle
        else:
            high = middle
    if best is None:
        taken = "" if full is None else f": the dense model takes {full:.2f} ms here"
        raise BudgetError(
            f"No plan found runs within {budget}{taken}.",
            "Ask for more time, or allow more dimensions to be cut.",
        )
    return best
