"""What an artifact says of itself, as a page or a table shows it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python

from .errors import ArtifactError, PlanError
from .provenance import Provenance
from .shape import Facts, ViTShape
from .training import TrainConfig


class Accuracies(Facts):
    """Top-1 before and after, in percent. Intervals are 95%.

    Attributes:
        images: how many both were measured on.
        before_interval, after_interval: of each accuracy.
        difference_interval: of after minus before, paired by image.
        data: what they were measured on, in words.
    """

    after: float
    before: float | None = None
    images: int | None = None
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None
    difference_interval: tuple[float, float] | None = None
    data: str = ""


class Run(Facts):
    """One line of a page.

    Attributes:
        name: what the reader calls it, e.g. the folder.
        method: method with the settings that set it apart; runs of equal method share a colour.
        budget: as asked for.
        macs, params: after; `_before` where known.
        shape, dense: sizes after and before, where known.
        accuracy, seconds, peak_memory_mb: None means not measured.
        preprocessing: of the images, in words.
        conditions: what the measurements depend on.
    """

    name: str
    method: str
    budget: str
    macs: int
    params: int
    macs_before: int | None = None
    params_before: int | None = None
    shape: ViTShape | None = None
    dense: ViTShape | None = None
    accuracy: Accuracies | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    preprocessing: str = ""
    conditions: dict[str, Any] = Field(default_factory=dict)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """What an artifact says about itself.

    Raises:
        ArtifactError: when the folder is no artifact, or its record is damaged.
    """
    from .artifact import load

    known: Provenance = load(folder).vitailor  # type: ignore[assignment]  # load puts it there
    try:
        return run_of(known, Path(folder).resolve().name)
    except (LookupError, TypeError, ValueError, PlanError) as error:
        why = " ".join(str(error).split())
        raise ArtifactError(
            f"record.json of {folder} is not what vitailor writes: {why}.", "Compress again."
        ) from error


def run_of(known: Provenance, name: str) -> Run:
    """One line of a page, from the record a compressed model carries."""
    record = known.record
    return Run(
        name=name,
        method=" + ".join(_labels(known)) or "dense",
        budget=" + ".join(step.budget for step in known.steps) or "none",
        macs=known.shape.macs,
        params=known.shape.params,
        macs_before=_number(record, "macs", "before"),
        params_before=_number(record, "params", "before"),
        shape=known.shape,
        dense=_shape(record.get("shape_before")),
        accuracy=_accuracies(record),
        seconds=record.get("seconds"),
        peak_memory_mb=record.get("peak_memory_mb"),
        preprocessing=_preprocessing(known),
        conditions=record.get("conditions") or {},
    )


def _labels(known: Provenance) -> list[str]:
    """What was done to a model: its compressions, and a training after them."""
    found = [method_label(step.method, step.settings) for step in known.steps]
    trained = known.record.get("training")
    settings = trained.get("settings") if isinstance(trained, dict) else None
    if isinstance(settings, dict):
        told = _changed(TrainConfig, settings)
        found.append(f"training ({', '.join(told)})" if told else "training")
    return found


def method_label(method: str, settings: dict[str, Any]) -> str:
    """The method, with the settings that are not its defaults."""
    from .methods import METHODS

    config = METHODS.get(method)
    changed = _changed(config, settings) if config is not None else []
    return f"{method} ({', '.join(changed)})" if changed else method


def _changed(config: type[BaseModel], settings: dict[str, Any], prefix: str = "") -> list[str]:
    """`field=value` for what is not the default, with a dot before fields of fields."""
    found = []
    for name, value in settings.items():
        field = config.model_fields.get(name)
        default = field.default if field is not None else value
        if isinstance(default, BaseModel) and isinstance(value, dict):
            found += _changed(type(default), value, f"{prefix}{name}.")
        elif value != to_jsonable_python(default):  # in JSON a tuple is a list
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(f"{prefix}{name}={text}")
    return found


def _number(record: dict[str, Any], key: str, when: str) -> int | None:
    pair = record.get(key)
    value = pair.get(when) if isinstance(pair, dict) else None
    return value if isinstance(value, int) else None


def _shape(content: Any) -> ViTShape | None:
    return ViTShape.from_json(json.dumps(content)) if isinstance(content, dict) else None


def _accuracies(record: dict[str, Any]) -> Accuracies | None:
    """Accuracies of a record; an interval that is not recorded follows from the number of images."""
    from .evaluation import wilson_interval

    top1 = record.get("top1")
    if not isinstance(top1, dict) or top1.get("after") is None:
        return None
    images = record.get("images") or top1.get("images")

    def interval(percent: float | None) -> tuple[float, float] | None:
        if percent is None or not images:
            return None
        low, high = wilson_interval(round(percent / 100 * images), images)
        return 100 * low, 100 * high

    after, before, ends = top1["after"], top1.get("before"), top1.get("interval")
    return Accuracies(
        after=after,
        before=before,
        images=images,
        before_interval=interval(before),
        after_interval=interval(after),
        difference_interval=(ends[0], ends[1]) if ends else None,
        data=str(record.get("evaluated_on") or ""),
    )


def _preprocessing(known: Provenance) -> str:
    facts = known.preprocessing
    if facts is None:
        return ""
    _, height, width = facts.input_size
    return (
        f"{height}\N{MULTIPLICATION SIGN}{width} px, {facts.interpolation}, crop {facts.crop_pct:g}"
    )
