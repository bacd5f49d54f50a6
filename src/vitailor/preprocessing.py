"""How an image becomes a model's input: timm's evaluation transform, as facts that an artifact stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, ValidationError, model_validator

from .errors import UsageError
from .shape import Facts, Positive, describe_validation_error

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

PerChannel = tuple[float, float, float]


class Preprocessing(Facts):
    """Settings of timm's evaluation transform.

    Attributes:
        input_size: channels, height and width in pixels.
        crop_pct: fraction of the resized image that the crop keeps.
        crop_mode: what happens to images that are not of that aspect: cut the sides, squash or pad.
        interpolation: resampling filter.
        mean, std: per channel, of pixel values in [0, 1].
    """

    input_size: tuple[Literal[3], Positive, Positive]
    crop_pct: Annotated[float, Field(gt=0)]
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    mean: PerChannel
    std: PerChannel

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    def transform(self) -> Callable[[Image], Tensor]:
        """timm's evaluation transform: PIL image to float32 tensor of shape `input_size`."""
        from timm.data.transforms_factory import create_transform

        return cast(
            "Callable[[Image], Tensor]",
            create_transform(
                input_size=self.input_size,
                is_training=False,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                crop_pct=self.crop_pct,
                crop_mode=self.crop_mode,
            ),
        )


def resolve_preprocessing(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Preprocessing:
    """Preprocessing of a model: what its artifact stores, else timm's for the architecture.

    Args:
        model: where it was built for another image size than its pretrained configuration names, the
            size it was built for counts.
        input_size: overrides; one side, (height, width) or (channels, height, width).
        crop_pct, interpolation: override.
        mean, std: override; one number goes for all channels.

    Raises:
        UsageError: naming the setting that is out of range.
    """
    stored = getattr(getattr(model, "vitailor", None), "preprocessing", None)
    if isinstance(stored, Preprocessing):
        fields = {name: getattr(stored, name) for name in Preprocessing.model_fields}
    else:
        from timm.data import config

        fields = dict(cast("Any", config).resolve_model_data_config(model))
        side = _image_size(model)
        if side is not None:
            fields["input_size"] = (3, *side)
    if input_size is not None:
        size = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
        fields["input_size"] = (3, *size) if len(size) == 2 else size
    overrides = {"crop_pct": crop_pct, "interpolation": interpolation, "mean": mean, "std": std}
    fields |= {name: value for name, value in overrides.items() if value is not None}
    for name in ("mean", "std"):
        value = fields[name]
        values = (value,) if isinstance(value, int | float) else tuple(value)
        fields[name] = values * 3 if len(values) == 1 else values
    fields["input_size"] = tuple(fields["input_size"])
    try:
        return Preprocessing(**fields)
    except ValidationError as error:
        raise UsageError(
            describe_validation_error("Preprocessing", error),
            "Correct --input-size, --crop-pct, --interpolation, --mean or --std.",
        ) from None


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width a model was built for, where it says so.

    timm's configuration names the pretrained size even when the model was built with another
    `img_size`, and models of other libraries have no such configuration.
    """
    owners: tuple[tuple[Any, str], ...] = (
        (getattr(model, "patch_embed", None), "img_size"),  # timm
        (model, "image_size"),  # torchvision, T2T-ViT
        (getattr(model, "config", None), "image_size"),  # transformers
    )
    for owner, name in owners:
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None
