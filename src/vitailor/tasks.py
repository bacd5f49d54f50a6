"""What a method is given to work on: everything opened and checked before work starts, so that bad input loses nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .benchmarking import bench
from .budget import Budget
from .data import ClassMap, Data, ImageSet, open_images
from .data.timm_datasets import PREFIXES
from .errors import DataError, UsageError
from .hosts import host_of, shape_of
from .methods import Method, OnEvent, OnTrial, Task, stages
from .methods.base import keeps_all
from .preprocessing import Preprocessing
from .processes import is_first_process
from .shape import ViTShape
from .training import Augmentation, require_float32

#: Images of a folder that are calibrated on, unless told otherwise.
IMAGES = 512


def prepare(
    model: nn.Module,
    method: Method,
    budget: Budget,
    data: Data | None,
    images: int | None,
    class_map: ClassMap | None,
    device: str | torch.device | None,
    seed: int,
    preprocessing: Preprocessing,
    progress: Callable[[int, int], None] | None,
) -> Task:
    if seed < 0:
        raise UsageError(f"The seed {seed} is negative.", "Give 0 or more.")
    shape = shape_of(model)
    method.check(shape, budget)
    if method.cuts_tokens(budget) and not keeps_all(budget, shape):
        host_of(model).require_static_size(model)
    calibration: ImageSet | None = None
    if data is not None:
        named = isinstance(data, str | os.PathLike)
        if images is None and str(data).startswith(PREFIXES):
            images = IMAGES  # such sets are large, and some can only be read from the start
        classes = shape.num_classes or None
        calibration = open_images(
            data,
            preprocessing,
            images=images,
            seed=seed,
            num_classes=classes if method.needs_labels else None,
            class_map=_map_for(data, class_map, method.needs_labels),
            split="train",
        )
        if named and images is None and len(calibration) > IMAGES:
            calibration = calibration.draw(IMAGES, seed)
    elif method.needs_images:
        raise UsageError(
            f"The method '{method.name}' needs calibration images.", "Pass data=, or --calibrate."
        )
    if method.trains is not None:
        require_float32(model)
    home = next(model.parameters()).device
    target = torch.device(device) if device is not None else home
    # The caller's model is never moved: work on another device happens on a copy.
    as_it_is = target == home and not any(module.training for module in model.modules())
    working = model if as_it_is else copy.deepcopy(model).to(target)
    return Task(
        model=working.eval(),
        shape=shape,
        budget=budget,
        data=calibration,
        device=target,
        stopwatch=lambda models: _stopwatch(models, target),
        seed=seed,
        progress=progress or (lambda done, total: None),
    )


def with_training(
    task: Task,
    train: Data | None,
    method: Method,
    preprocessing: Preprocessing,
    class_map: ClassMap | None,
    folder: str | os.PathLike[str] | None,
    resume: bool,
    on_event: OnEvent | None,
) -> Task:
    """The task with what a method that trains needs; refused for one that does not."""
    config = method.trains
    if method.resumable:
        place = None if folder is None else Path(folder)
        if place is not None and place.exists() and not place.is_dir():
            raise UsageError(f"{place} is not a folder.", "Name another for checkpoints.")
        task = replace(task, folder=place, resume=resume, on_event=on_event)
    if config is None and train is None:
        return task
    if config is None:
        raise UsageError(
            f"The method '{method.name}' does not train.",
            "Train its result afterwards (vitailor.train), or leave the training images out.",
        )
    if train is None:
        raise UsageError(
            f"The method '{method.name}' needs training images.", "Pass train=, or --train."
        )
    images = open_images(
        train,
        Augmentation.of(preprocessing, config),
        num_classes=task.shape.num_classes or None,
        class_map=class_map,
        labels_needed=method.trains_on_labels,
        split="train",
    )
    return replace(task, train=images)


def with_reward(
    task: Task,
    reward: Data | None,
    method: Method,
    preprocessing: Preprocessing,
    class_map: ClassMap | None,
    on_trial: OnTrial | None,
) -> Task:
    """The task with what candidates of a search are judged on; and labels where the method needs them."""
    if reward is not None:
        if not method.searches:
            raise UsageError(
                f"The method '{method.name}' does not search.", "Leave the reward images out."
            )
        streamed = str(reward).startswith(PREFIXES)
        images = open_images(
            reward,
            preprocessing,
            images=method.judges_on if streamed else None,  # all of it may not fit in memory
            seed=task.seed,
            num_classes=(task.shape.num_classes or None) if method.needs_labels else None,
            class_map=_map_for(reward, class_map, method.needs_labels),
            labels_needed=method.needs_labels,
            split="train",
        )
        task = replace(task, reward=images)
    labels = task.data if task.reward is None else task.reward
    if method.needs_labels and not (labels is not None and labels.labeled):
        raise DataError(
            f"The method '{method.name}' with these settings needs labels, but the calibration images "
            "have none.",
            "Put them in class folders, or choose settings that need no labels.",
        )
    return replace(task, on_trial=on_trial)


def begin_anew(task: Task) -> None:
    """Remove checkpoints of an earlier run, unless it is resumed. Last of all: bad input must lose nothing."""
    if task.folder is not None and not task.resume and is_first_process():
        stages.clear(task.folder)


def _map_for(data: Data, class_map: ClassMap | None, labels: bool) -> ClassMap | None:
    """The class map, where class folders are read."""
    return class_map if labels and isinstance(data, str | os.PathLike) else None


def open_test(
    evaluate: Data | None,
    preprocessing: Preprocessing,
    shape: ViTShape,
    class_map: ClassMap | None,
) -> ImageSet | None:
    if evaluate is None:
        return None
    classes = shape.num_classes or None
    return open_images(
        evaluate,
        preprocessing,
        num_classes=classes,
        class_map=_map_for(evaluate, class_map, labels=True),
        labels_needed=True,
    )


def require_unseen(test: ImageSet | None, task: Task, method: Method) -> None:
    """Refuse to evaluate on images that sizes may be chosen by."""
    chosen_by = task.reward if task.reward is not None else task.data
    searches = method.searches and not keeps_all(task.budget, task.shape)
    if test is None or chosen_by is None or not searches:
        return
    seen = len(set(test.identities) & set(chosen_by.identities))
    if seen:
        raise UsageError(
            f"{seen} of the {len(test)} images to evaluate on are among those that candidates may be judged on: "
            "the accuracy would flatter.",
            "Evaluate on images of their own.",
        )


def _stopwatch(models: list[nn.Module], device: torch.device) -> list[float]:
    named = [(str(i), model) for i, model in enumerate(models)]
    dtype = next(models[0].parameters()).dtype
    precision = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    rows = bench(named, batch_sizes=(1,), dtype=precision, device=device, runs=20, warmup=3).models
    return [row.latency_ms.median for row in rows]
