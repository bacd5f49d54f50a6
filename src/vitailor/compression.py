"""`compress`: model in, smaller model out. The one verb over every method."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn

from . import __version__
from .benchmarking import conditions
from .budget import Budget, cost
from .data import ClassMap, Data, ImageSet
from .errors import BudgetError, UsageError
from .evaluation import Accuracy, paired_difference
from .evaluation import evaluate as measure_accuracy
from .hosts import shape_of
from .methods import Method, OnEvent, OnTrial, Task
from .plan import Plan
from .preprocessing import Preprocessing, resolve_preprocessing
from .provenance import Provenance, Step, provenance_of, weights_hash
from .shape import ViTShape
from .tasks import begin_anew, open_test, prepare, require_unseen, with_reward, with_training


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
        images: how many of them, drawn by seed and spread over classes; by default `tasks.IMAGES` of a folder or a
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
    preprocessing = preprocessing or resolve_preprocessing(model)
    task = prepare(
        model, method, budget, data, images, class_map, device, seed, preprocessing, progress
    )
    task = with_training(task, train, method, preprocessing, class_map, folder, resume, on_event)
    task = with_reward(task, reward, method, preprocessing, class_map, on_trial)
    test = open_test(evaluate, preprocessing, task.shape, class_map)
    if before is not None and (test is None or before.list_hash != test.list_hash):
        raise UsageError(
            "The accuracy given is not on the images to evaluate on.", "Leave before= out."
        )
    require_unseen(test, task, method)
    if test is not None and before is None:
        # First of all, so that an image that cannot be read loses nothing.
        with _undisturbed(seed):
            before = measure_accuracy(task.model, test)
    begin_anew(task)
    started = perf_counter()
    with _undisturbed(seed):
        outcome = method.run(task)
        small = outcome.model.eval()
        if outcome.whole:
            _check_budget(budget, task.shape, shape_of(small))
        seconds = perf_counter() - started
        latency = _latencies(task, small) if outcome.whole else {}
        accuracy = _accuracies(small, test, before)
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
    task = prepare(
        model, method, budget, data, images, class_map, device, seed, preprocessing, progress
    )
    task = with_training(task, train, method, preprocessing, class_map, folder, resume, on_event)
    task = with_reward(task, reward, method, preprocessing, class_map, on_trial)
    begin_anew(task)
    with _undisturbed(seed):
        shape = method.plan(task).result(task.shape)
    _check_budget(budget, task.shape, shape)
    return shape


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Random state seeded inside and as before outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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


def _accuracies(small: nn.Module, test: ImageSet | None, before: Accuracy | None) -> dict[str, Any]:
    if test is None or before is None:
        return {}
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
        settings=method.settings(),
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
