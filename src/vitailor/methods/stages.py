"""Stages of training that methods share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..data import ImageSet
from ..errors import UsageError
from ..provenance import weights_hash
from ..training import Event, TrainConfig, fit
from .base import Task


def finetune(task: Task, config: TrainConfig, small: nn.Module) -> dict[str, Any]:
    """Fine-tune what a method has cut, in place; returns what is worth recording."""
    found = fit(
        small,
        seeded(config, task),
        images(task),
        teacher=task.taught_by,
        folder=folder(task, "finetune"),
        resume=task.resume,
        identity={"model": weights_hash(small)},
        on_event=told(task, "fine-tuning"),
        device=task.device,
    )
    return {"losses": found.losses, "images_per_s": found.images_per_s}


def seeded(config: TrainConfig, task: Task) -> TrainConfig:
    """The settings with the task's seed on top of their own."""
    return config.model_copy(update={"seed": config.seed + task.seed})


def images(task: Task) -> ImageSet:
    """The training images.

    Raises:
        UsageError: when there are none.
    """
    if task.train is None:
        raise UsageError("The method needs training images.", "Pass train=, or --train.")
    return task.train


def folder(task: Task, stage: str) -> Path | None:
    """Where a stage keeps its checkpoints."""
    return None if task.folder is None else task.folder / stage


def told(task: Task, stage: str) -> Callable[[Event], None] | None:
    """What a stage tells of its progress to."""
    tell = task.on_event
    return None if tell is None else lambda event: tell(stage, event)
