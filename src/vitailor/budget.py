"""How small or how fast the result must be."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import BudgetError, UsageError
from .shape import ViTShape, describe_validation_error


class Budget(BaseModel):
    """A limit on exactly one of MACs, parameters and latency.

    MACs and parameters are counted and never exceeded. Latency is the median for one image in the model's precision,
    with torch's present number of threads, measured beside the dense model while sizes are chosen.

    Args:
        macs: multiply-adds of the whole model; an int is absolute, a float in (0, 1] the fraction kept.
        params: parameters, likewise.
        latency_ms: latency in milliseconds on the device at hand.
        latency: latency as a fraction of the dense model's.

    Raises:
        UsageError: unless exactly one limit is given and it is positive.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    macs: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    params: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    latency: Annotated[float, Field(gt=0, le=1)] | None = None

    def __init__(self, **limits: int | float | None) -> None:
        try:
            super().__init__(**limits)
        except ValidationError as error:
            raise UsageError(
                describe_validation_error("Budget", error),
                "Give one limit: an int is absolute, a float in (0, 1] is the fraction kept.",
            ) from None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one limit is needed, got {', '.join(given) or 'none'}")
        return self

    @property
    def metric(self) -> str:
        return next(n for n in type(self).model_fields if getattr(self, n) is not None)

    @property
    def value(self) -> int | float:
        value: int | float = getattr(self, self.metric)
        return value

    def limit(self, shape: ViTShape) -> int:
        """The absolute limit in MACs or parameters for a model of `shape`.

        Raises:
            BudgetError: when the budget is a latency, which no shape can tell.
        """
        if self.metric not in ("macs", "params"):
            raise BudgetError("A latency budget has no closed form.", "Measure it instead.")
        dense = cost(shape, self.metric)
        return self.value if isinstance(self.value, int) else int(self.value * dense)

    def __str__(self) -> str:
        value = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:g}"
        return f"{self.metric} {value}"


def cost(shape: ViTShape, metric: str) -> int:
    """Cost of a shape in the unit of a budget, "macs" or "params"."""
    return shape.macs if metric == "macs" else shape.params
