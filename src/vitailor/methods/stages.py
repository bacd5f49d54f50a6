"""Stages of training that methods share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageSet
from ..errors import UsageError
from ..plan import Plan
from ..processes import is_first_process
from ..provenance import weights_hash
from ..surgery import apply
from ..training import Event, TrainConfig, checkpoints, fit
from ..training.prepare import accelerator_for
from .base import Outcome, Task

#: The model that a method has cut before training, and sizes that were measured, by what they depend on.
CUT, PLAN = "cut.pt", "plan-{}.pt"
#: Folders of the stages that train.
SPARSE, FINETUNE, SHARING = "sparse", "finetune", "sharing"


def clear(folder: Path) -> None:
    """Remove what earlier runs have left to go on from."""
    for stage in (SPARSE, FINETUNE, SHARING):
        checkpoints.clear(folder / stage)
    for old in (folder / CUT, *folder.glob(PLAN.format("*"))):
        old.unlink(missing_ok=True)


def settled(
    task: Task, config: TrainConfig, identity: dict[str, Any], make: Callable[[], Outcome]
) -> Outcome:
    """What is made before training, as it was first made: kept beside the checkpoints, and the same in every
    process. Made anew, measured latencies and sums on a GPU come out otherwise.

    Args:
        identity: what it depends on.
        make: gives a model that `task.model` becomes by its plan, its weights apart.

    Raises:
        UsageError: when what the folder holds was made of something else.
    """

    def state() -> dict[str, Any]:
        made = make()
        return {
            "plan": made.plan.to_json(),
            "facts": made.facts,
            "model": made.model.state_dict(),
        }

    found = agreed(task, config, CUT, identity, state)
    plan = Plan.from_json(found["plan"])
    model = apply(task.model, plan)
    model.load_state_dict(found["model"])
    return Outcome(model, plan, found["facts"])


def agreed(
    task: Task,
    config: TrainConfig,
    name: str,
    identity: dict[str, Any],
    make: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What was first made, kept under this name beside the checkpoints, and the same in every process.

    Args:
        identity: what it depends on.

    Raises:
        UsageError: when what the folder holds was made of something else.
    """
    found = None
    if task.folder is not None and task.resume:
        found = checkpoints.load(task.folder, name, identity, processes=0)
    if found is None:
        found = {"identity": identity, "processes": 0, **make()}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The processes find each other.
        accelerator_for(config.model_copy(update={"tracker": None}), task.device, None)
        shared = [found]
        torch.distributed.broadcast_object_list(shared, src=0)
        found = shared[0]
    if task.folder is not None and is_first_process():
        checkpoints.save(task.folder, name, found)
    return found


def finetune(
    task: Task, config: TrainConfig, small: nn.Module, identity: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fine-tune what a method has cut, in place; returns what is worth recording.

    Args:
        identity: what `small` depends on; by default a hash of its weights.
    """
    found = fit(
        small,
        seeded(config, task),
        images(task),
        teacher=task.taught_by,
        folder=folder(task, FINETUNE),
        resume=task.resume,
        identity=identity or {"model": weights_hash(small)},
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
