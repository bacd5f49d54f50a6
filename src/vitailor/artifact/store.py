"""Saving a model as an artifact and loading it again."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from pydantic_core import to_json
from torch import nn

from ..errors import ArtifactError, PlanError, UsageError
from ..hosts import shape_of
from ..preprocessing import Preprocessing, resolve_preprocessing
from ..provenance import Provenance, Step, provenance_of
from ..shape import FORMAT_VERSION, Facts, ViTShape, revise
from .card import model_card
from .folders import current, replacing
from .tensors import entries_of, fitting_skeleton, read_tensors, write_tensors

PLAN, WEIGHTS, RECORD, CARD = "plan.json", "model.safetensors", "record.json", "README.md"
MAX_JSON_BYTES = 1 << 28  # plans of large models with many steps take a few MiB


class PlanFile(Facts):
    """Content of plan.json. `steps` are not understood, only carried along."""

    version: int
    shape: ViTShape
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    steps: list[Any]


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a model as an artifact.

    The folder appears as a whole: a killed process leaves what was there before, or the new artifact.
    Other files in a folder that is overwritten stay in it.

    Args:
        model: any supported model, compressed or not; its sizes are read afresh, so it may have been
            trained or changed since.
        path: folder to write.
        overwrite: whether the folder may exist and hold something.

    Returns:
        the path.

    Raises:
        UnsupportedModelError: when a part of the model cannot be accounted for.
        ArtifactError: when the folder is not empty or cannot be written, or when the model holds tensors
            that could not be loaded again.
    """
    path = Path(path)
    known = _up_to_date(model)
    tensors = model.state_dict()
    if any(t.is_meta for t in tensors.values()):
        raise ArtifactError(
            "The model has no weights: it is on the meta device.", "Load them first."
        )
    # What would not load is not written.
    fitting_skeleton(known.shape, entries_of(tensors))
    plan = PlanFile(
        version=FORMAT_VERSION,
        shape=known.shape,
        preprocessing=known.preprocessing,
        class_names=known.class_names,
        steps=[step.model_dump(mode="json") for step in known.steps],
    )
    with replacing(path, overwrite=overwrite) as folder:
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        # Nothing that was noted down may keep a model from being saved: what JSON has no word for
        # becomes null or text.
        record = to_json(known.record, indent=1, fallback=str, inf_nan_mode="null")
        (folder / RECORD).write_bytes(record)
        (folder / CARD).write_text(model_card(known), encoding="utf-8")
        write_tensors(tensors, folder / WEIGHTS)
    return path


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> nn.Module:
    """Load an artifact. No code of it is run, and every size is checked before memory is taken.

    Args:
        path: folder that `save` wrote, with this or any earlier version of vitailor.
        device: where to put the model; the CPU by default.

    Returns:
        A plain model of the host library's class in evaluation mode, with `.vitailor`.

    Raises:
        ArtifactError, PlanError: when the folder is no artifact, is damaged, or is from a newer version,
            with the reason.
    """
    asked, folder = Path(path), current(Path(path))
    try:
        before = folder.stat()
        plan = _parse_plan(_read_json(folder / PLAN))
        record = _read_record(folder / RECORD)
        model = read_tensors(_file(folder / WEIGHTS), plan.shape)
        after = folder.stat()
    except FileNotFoundError:
        raise ArtifactError(f"There is no folder {asked}.", "Check the path.") from None
    except OSError as error:
        raise ArtifactError(f"{asked} cannot be read: {error.strerror}.", "Check it.") from error
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        raise ArtifactError(f"{asked} was replaced while it was read.", "Load it again.")
    cast(Any, model).vitailor = Provenance(
        shape=plan.shape,
        steps=_parse_steps(plan.steps),
        record=record,
        preprocessing=plan.preprocessing,
        class_names=plan.class_names,
    )
    return model if device is None else model.to(device)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of this name has a plan.json."""
    return (current(Path(path)) / PLAN).is_file()


def _up_to_date(model: nn.Module) -> Provenance:
    """What is known about the model, with the sizes it has now."""
    known, shape = provenance_of(model), shape_of(model)
    if known is None:
        try:
            preprocessing = resolve_preprocessing(model)
        except UsageError:  # not an image of three channels, say
            preprocessing = None
        return Provenance(shape=shape, preprocessing=preprocessing)
    if not shape.name:
        shape = revise(shape, name=known.shape.name)
    names = known.class_names
    if names is not None and len(names) != shape.num_classes:
        names = None  # the head was replaced since
    return revise(known, shape=shape, class_names=names)


def _parse_plan(content: Any) -> PlanFile:
    version = content.get("version") if isinstance(content, dict) else None
    # First, because a newer version may have other fields.
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(
            f"{PLAN} states no format version.", "It is not vitailor's or is damaged."
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"The artifact has format version {version}; this vitailor knows up to {FORMAT_VERSION}.",
            "Upgrade vitailor.",
        )
    plan = PlanFile.from_json(json.dumps(content))
    names = plan.class_names
    if names is not None and len(names) != plan.shape.num_classes:
        raise ArtifactError(
            f"There are {len(names)} class names for {plan.shape.num_classes} classes.",
            f"{PLAN} is damaged.",
        )
    return plan


def _parse_steps(steps: list[Any]) -> tuple[Step, ...]:
    parsed = []
    for number, step in enumerate(steps, 1):
        try:
            parsed.append(Step.from_json(json.dumps(step)))
        except PlanError as error:
            warnings.warn(f"Step {number} of the artifact is left out: {error}", stacklevel=3)
    return tuple(parsed)


def _read_record(file: Path) -> dict[str, Any]:
    """Content of record.json; what was measured must not keep a model from being loaded."""
    try:
        record = _read_json(file)
    except ArtifactError as error:
        warnings.warn(f"The artifact's record is left out: {error}", stacklevel=3)
        return {}
    if not isinstance(record, dict):
        warnings.warn(f"The artifact's record is left out: {RECORD} is no object.", stacklevel=3)
        return {}
    return record


def _read_json(file: Path) -> Any:
    size = _file(file).stat().st_size
    if size > MAX_JSON_BYTES:
        raise ArtifactError(f"{file} is too large to be vitailor's ({size:,} bytes).")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}.", "Get the artifact again.") from None


def _file(file: Path) -> Path:
    if not file.is_file() and file.parent.is_dir():
        raise ArtifactError(
            f"{file.parent} is no artifact: it has no {file.name}.",
            "Name a folder that vitailor wrote.",
        )
    return file
