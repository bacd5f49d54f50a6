"""`compress`: model in, smaller model out. The one verb over every method."""

from __future__ import annotations

import copy
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn

from . import __version__
from .benchmarking import bench, conditions
from .budget import Budget, cost
from .data import ClassMap, Data, ImageSet, open_images
from .data.timm_datasets import PREFIXES
from .errors import BudgetError, DataError, UsageError
from .evaluation import Accuracy, paired_difference
from .evaluation import evaluate as measure_accuracy
from .hosts import shape_of
from .methods import Method, OnEvent, OnTrial, Task, stages
from .methods.base import keeps_all
from .plan import Plan
from .preprocessing import Preprocessing, resolve_preprocessing
from .provenance import Provenance, Step, provenance_of, weights_hash
from .shape import ViTShape
from .training import Augmentation, require_float32
from .training.checkpoints import first_process

#: Images of a folder that are calibrated on, unless told otherwise.
IMAGES = 512


def compress(
    model: nn.Module,
    method: Method,
    budget: Budget,
    *,
    data: Data | None = None,
    images: int | None = None,
    evaluate: Data | None = None,
    before: Accuracy | None = None,
    train: Data | None = None,
    reward: Data | None = None,
    class_map: ClassMap | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    source: str = "",
    preprocessing: Preprocessing | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_event: OnEvent | None = None,
    on_trial: OnTrial | None = None,
) -> nn.Module:
    """Cut a trained Vision Transformer to a budget.

    Args:
        model: any supported model; left exactly as it is, and so are random state and torch's flags.
        method: what to do, e.g. `ClosedForm()`.
        budget: never exceeded, and met within one step of the smallest unit.
        data: calibration images: a path, a dataset, or an iterable of tensors or (images, labels);
            labels are ignored unless the method asks for them.
        images: how many of them, drawn by seed and spread over classes; by default `IMAGES` of a folder or a
            named data set, or all if there are fewer, and all of anything else.
        evaluate: labeled images to measure accuracy on, before and after; recorded with the model. For a method
            that searches, others than those that its candidates may be judged on.
        before: the model's accuracy on these, where it is known already; else it is measured.
        train: training images, for methods that train, e.g. `VTP`; augmented as their settings say.
        reward: images that candidates of a search are judged on, for `MultiDim`: such as `data` does not hold, where
            there are enough; else those it holds are not calibrated on. By default some of `data`.
        class_map: class index of each class folder of `evaluate`, `train` and `reward`.
        folder: for checkpoints of training and the journal of a search; None for none.
        resume: go on from the checkpoints in `folder`, if there are any.
        device: where to work; the model's own device by default. The result is on the model's device.
        seed: of everything random. The same seed and thread count give the same plan on a CPU; a GPU adds
            in no fixed order.
        source: how the user names the model, for the record.
        preprocessing: of images that are given as files; the model's own by default.
        progress: called with how much is done and how much there is.
        on_event: told about training: the stage's name and a `training.Event`.
        on_trial: told about a search: candidates judged, how many there are to be, the best reward so far.

    Returns:
        A plain module of the host's class in eval mode, with its provenance as `.vitailor`.

    Raises:
        UsageError, UnsupportedModelError, BudgetError, DataError: before any work starts.
    """
    started = perf_counter()
    preprocessing = preprocessing or resolve_preprocessing(model)
    task = _prepare(
        model, method, budget, data, images, class_map, device, seed, preprocessing, progress
    )
    task = _with_training(task, train, method, preprocessing, class_map, folder, resume, on_event)
    task = _with_reward(task, reward, method, preprocessing, class_map, on_trial)
    test = _open_test(evaluate, preprocessing, task.shape, class_map)
    if before is not None and (test is None or before.list_hash != test.list_hash):
        raise UsageError(
            "The accuracy given is not on the images to evaluate on.", "Leave before= out."
        )
    _require_unseen(test, task, method)
    _begin_anew(task)
    with _undisturbed(seed):
        outcome = method.run(task)
        small = outcome.model.eval()
        if outcome.whole:
            _check_budget(budget, task.shape, shape_of(small))
        seconds = perf_counter() - started
        latency = _latencies(task, small) if outcome.whole else {}
        accuracy = _accuracies(task.model, small, test, before)
    small = small.to(next(model.parameters()).device)
    step = _step(model, method, budget, outcome.plan, seed, source)
    earlier = provenance_of(model)
    after = shape_of(small)
    record = {
        "method": method.name,
        "budget": str(budget),
        "macs": {"before": task.shape.macs, "after": after.macs},
        "params": {"before": task.shape.params, "after": after.params},
        "seconds": round(seconds, 2),
        "peak_memory_mb": peak_memory_mb(),
        "shape_before": task.shape.model_dump(mode="json"),
        "calibration": _describe(task.data),
        **({"training": _describe(task.train)} if task.train is not None else {}),
        "conditions": conditions(task.device) | {"threads": torch.get_num_threads()},
        "facts": outcome.facts,
        **_trained_before(earlier),
        **latency,
        **accuracy,
    }
    # nn.Module would take no notice of a plain attribute, and deepcopy and fine-tuning carry it along.
    cast(Any, small).vitailor = Provenance(
        shape=after,
        steps=(*(earlier.steps if earlier else ()), step),
        record=record,
        preprocessing=preprocessing,
        class_names=earlier.class_names if earlier else None,
    )
    return small


def plan_only(
    model: nn.Module,
    method: Method,
    budget: Budget,
    *,
    data: Data | None = None,
    images: int | None = None,
    train: Data | None = None,
    reward: Data | None = None,
    class_map: ClassMap | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    source: str = "",
    preprocessing: Preprocessing | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_event: OnEvent | None = None,
    on_trial: OnTrial | None = None,
) -> ViTShape:
    """The sizes that `compress` would cut to, found in the same way; arguments as there."""
    preprocessing = preprocessing or resolve_preprocessing(model)
    task = _prepare(
        model, method, budget, data, images, class_map, device, seed, preprocessing, progress
    )
    task = _with_training(task, train, method, preprocessing, class_map, folder, resume, on_event)
    task = _with_reward(task, reward, method, preprocessing, class_map, on_trial)
    _begin_anew(task)
    with _undisturbed(seed):
        shape = method.plan(task).result(task.shape)
    _check_budget(budget, task.shape, shape)
    return shape


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# -- before work starts --------------------------------------------------------------------------


def _prepare(
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


def _with_training(
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


def _with_reward(
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
        images = open_images(
            reward,
            preprocessing,
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


def _begin_anew(task: Task) -> None:
    """Remove checkpoints of an earlier run, unless it is resumed. Last of all: bad input must lose nothing."""
    if task.folder is not None and not task.resume and first_process():
        stages.clear(task.folder)


def _map_for(data: Data, class_map: ClassMap | None, labels: bool) -> ClassMap | None:
    """The class map, where class folders are read."""
    return class_map if labels and isinstance(data, str | os.PathLike) else None


def _open_test(
    evaluate: Data | None,
    preprocessing: Preprocessing,
    shape: ViTShape,
    class_map: ClassMap | None,
) -> ImageSet | None:
    if evaluate is None:
        return None
    classes = shape.num_classes or None
    return open_images(
        evaluate, preprocessing, num_classes=classes, class_map=class_map, labels_needed=True
    )


def _require_unseen(test: ImageSet | None, task: Task, method: Method) -> None:
    """Refuse to evaluate on images that sizes may be chosen by."""
    chosen_by = task.reward if task.reward is not None else task.data
    if test is None or chosen_by is None or not method.searches:
        return
    if keeps_all(task.budget, task.shape):
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
    rows = bench(named, batch_sizes=(1,), device=device, runs=20, warmup=3).models
    return [row.latency_ms.median for row in rows]


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Random state seeded inside and as before outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# -- after it ------------------------------------------------------------------------------------


def _check_budget(budget: Budget, before: ViTShape, after: ViTShape) -> None:
    """The promise, checked on what was really built."""
    if budget.metric in ("macs", "params"):
        spent, limit = cost(after, budget.metric), budget.limit(before)
        if spent > limit:
            raise BudgetError(
                f"The result has {spent:,} {budget.metric}, over the budget of {limit:,}.",
                "Leave out settings that fix sizes (rate, share, energy), or ask for more.",
            )


def _latencies(task: Task, small: nn.Module) -> dict[str, Any]:
    """Of the model as it was built, where the budget is one of time."""
    if task.budget.metric in ("macs", "params"):
        return {}
    before, after = task.stopwatch([task.model, small])
    return {"latency_ms": {"before": before, "after": after}}


def _accuracies(
    dense: nn.Module, small: nn.Module, test: ImageSet | None, before: Accuracy | None
) -> dict[str, Any]:
    if test is None:
        return {}
    before = before or measure_accuracy(dense, test)
    after = measure_accuracy(small, test)
    _, low, high = paired_difference(after, before)
    return {
        "top1": {"before": before.top1, "after": after.top1, "interval": [low, high]},
        "top5": {"before": before.top5, "after": after.top5},
        "images": after.images,
        "evaluated_on": test.source,
        "evaluated_list_hash": test.list_hash,
    }


def _trained_before(earlier: Provenance | None) -> dict[str, Any]:
    """A training of the model that is compressed now."""
    found = (earlier.record if earlier else {}).get("training")
    return {"trained_before": found} if found else {}


def _describe(images: ImageSet | None) -> dict[str, Any]:
    if images is None:
        return {"images": 0}
    return {
        "source": images.source,
        "images": images.num_images,
        "list_hash": images.list_hash,
    }


def _step(
    model: nn.Module, method: Method, budget: Budget, plan: Plan, seed: int, source: str
) -> Step:
    known = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    return Step(
        source=source or str(known),
        weights_hash=weights_hash(model),
        method=method.name,
        settings=method.model_dump(mode="json"),
        budget=str(budget),
        seed=seed,
        versions={
            "vitailor": __version__,
            "torch": version("torch"),
            "timm": version("timm"),
            "python": platform.python_version(),
        },
        plan=plan,
    )
