"""Settings of training, checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from timm.data.transforms_factory import create_transform
from timm.optim import list_optimizers

from ..errors import UsageError
from ..shape import describe_validation_error

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class TrainConfig(BaseModel):
    """How a model is trained.

    Args:
        epochs: passes over the images.
        batch_size: images for each update, over all processes and accumulation steps together.
        lr: learning rate of the weights, as given: it is not scaled by the batch size.
        gate_lr: that of importance gates; None means a hundred times `lr`, since gates have further to go than
            weights. Gates have no weight decay.
        weight_decay: of matrices; biases and norms have none.
        optimizer: a name that timm knows.
        schedule: of timm; it moves at every update, "step" to a tenth after each third of the epochs.
        warmup_epochs, min_lr: of the schedule.
        clip_grad: largest norm of the gradient; None for no limit.
        accumulate: forward passes for each update, for batches that do not fit in memory.
        precision: of the forward pass; weights stay in float32.
        label_smoothing, mixup, cutmix: of the task loss.
        scale: range of the area that a random crop takes; None crops as in evaluation, or with
            RandAugment or erasing the middle of the image.
        hflip: probability that an image, of any source, is flipped left to right.
        rand_augment, random_erasing: timm's RandAugment string, and a probability; of image files.
        ema: decay of an exponential moving average of the weights, which is then what is validated and
            returned; None for none.
        distill: what is learned from a teacher: "soft" its class distribution at a temperature, "hard"
            its decision, "feature" its features before the head; None for nothing.
        alpha: weight of the teacher's loss; the labels' has the rest. At 1 labels are not needed.
        temperature: of soft distillation.
        checkpoint_every: updates between checkpoints inside an epoch; None saves at epochs' ends only.
        workers: processes that read images, for each process that trains; None for some where an accelerator
            would wait for one.
        tracker: a tracker that Accelerate knows, e.g. "tensorboard".
        seed: of everything random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 5e-5
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: NonNegative = 0.05
    optimizer: str = "adamw"
    schedule: Literal["cosine", "tanh", "step"] = "cosine"
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    min_lr: NonNegative = 0.0
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    scale: tuple[float, float] | None = None
    hflip: Fraction = 0.5
    rand_augment: str | None = None
    random_erasing: Fraction = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    distill: Literal["soft", "hard", "feature"] | None = None
    alpha: Fraction = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    tracker: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UsageError(
                describe_validation_error("TrainConfig", error),
                f"Settings: {', '.join(type(self).model_fields)}.",
            ) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if self.optimizer not in list_optimizers():
            raise ValueError(f"optimizer '{self.optimizer}' is unknown to timm")
        if 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs never reach lr"
            )
        if self.rand_augment is not None:
            try:
                create_transform(224, is_training=True, auto_augment=self.rand_augment)
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise ValueError(
                    f"rand_augment '{self.rand_augment}' is unknown to timm: {error}"
                ) from None
        if self.tracker is not None and self.tracker not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"tracker '{self.tracker}' is unknown to Accelerate: {known}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two rising fractions in (0, 1]")
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether a loss reads the labels."""
        return self.distill is None or self.alpha < 1

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0
