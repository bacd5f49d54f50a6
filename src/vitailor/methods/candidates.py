"""Candidates of a search: their sizes, how each is judged, and the best of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..calibrate import Batches
from ..data import ImageSet
from ..harm import measure
from ..harm_space import HarmSpace
from ..policy import Sizes, Space, sizes_of
from ..processes import is_first_process
from ..shape import ViTShape
from ..simulate import Simulator
from ..sizes import SearchDimension, Steps
from ..studies import Finished, Result, Sampler, search
from .base import Task
from .closed_form import Sorted

Reward = Literal["divergence", "accuracy"]
#: Images on which single cuts are measured.
HARM_IMAGES = 64
#: Candidates so far, in the folder for checkpoints.
HISTORY = "trials.jsonl"


@dataclass(frozen=True)
class Rules:
    """What all candidates have in common.

    Attributes:
        dense: the model's shape, with the rule by which tokens go.
        dimensions: what they cut.
        ridge: of compensation; None for none.
        reward: what they are judged by.
    """

    dense: ViTShape
    dimensions: tuple[SearchDimension, ...]
    ridge: float | None
    reward: Reward


@dataclass(frozen=True)
class Study:
    """Where candidates are kept, how many there are and how they are chosen: see `studies.search`."""

    name: str
    storage: str | Path | None
    sampler: Sampler
    trials: int
    initial: int | None


def harm_space(task: Task, ready: Sorted, rules: Rules, steps: Steps) -> HarmSpace:
    """Weights on what single cuts harm, measured on the task's calibration images."""
    single = _simulator(task.batches(HARM_IMAGES), task, ready, rules, whole=False)
    dimensions = tuple(d for d in rules.dimensions if d != "ranks")  # refused before
    return HarmSpace(measure(single, dimensions, steps), dimensions, steps)


def best(
    task: Task,
    judged: ImageSet,
    ready: Sorted,
    rules: Rules,
    space: Space | HarmSpace,
    study: Study,
) -> tuple[Sizes, list[bool], dict[str, Any]]:
    """The best candidate's sizes, which blocks fuse tokens, and what the search saw.

    Args:
        judged: images by which candidates are judged.
        ready: the model to cut, its moments and orders.
        space: what is searched.
    """
    metric, limit = task.budget.metric, task.budget.limit(task.shape)
    simulator = _simulator(replace(task, data=judged).batches(), task, ready, rules, whole=True)

    def reward(direction: dict[str, float]) -> tuple[float, dict[str, Any]]:
        shape = space.on_budget(direction, metric, limit)
        value = (
            simulator.accuracy(shape)
            if rules.reward == "accuracy"
            else -simulator.trial(shape, 0).harm
        )
        sizes = sizes_of(shape, rules.dimensions)
        fuses = [block.fuses for block in shape.blocks]
        facts = {"macs": shape.macs, "params": shape.params, "policy": sizes, "fuses": fuses}
        return value, facts

    def tell(trial: Finished, so_far: Result) -> None:
        _keep(task, so_far)
        task.progress(len(so_far.trials), study.trials)
        if task.on_trial is not None:
            task.on_trial(len(so_far.trials), study.trials, so_far.best.reward)

    task.progress(0, study.trials)
    found = search(
        reward,
        space.names,
        trials=study.trials,
        study=study.name,
        storage=study.storage,
        sampler=study.sampler,
        seed=task.seed,
        initial=study.initial,
        first=space.first,
        on_trial=tell,
    )
    # Sizes as they were judged: measured harms, if directions are weights on these, differ by machine.
    facts = found.best.facts
    seen = {
        "best": found.best.number,
        "trials": [_told(trial) for trial in found.trials],
        "own_trials": len(found.own),
        "overhead_seconds": round(found.overhead_seconds, 3),
        "judged_on": {
            "source": judged.source,
            "images": len(judged),
            "list_hash": judged.list_hash,
        },
    }
    return facts["policy"], facts["fuses"], seen


def _keep(task: Task, so_far: Result) -> None:
    """Candidates as JSON, one a line, beside the checkpoints: every worker's, after each of this one's."""
    if task.folder is None or not is_first_process():
        return
    task.folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_told(trial)) + "\n" for trial in so_far.trials)
    (task.folder / HISTORY).write_text(lines, encoding="utf-8")


def _told(trial: Finished) -> dict[str, Any]:
    return {
        "number": trial.number,
        "reward": trial.reward,
        **trial.facts,
        "seconds": round(trial.seconds, 3),
    }


def _simulator(batches: Batches, task: Task, ready: Sorted, rules: Rules, whole: bool) -> Simulator:
    """Measures candidates, `whole`, or single cuts."""
    return Simulator(
        ready.model,
        ready.moments,
        ready.orders,
        batches,
        rules.ridge,
        rules.dense.matching,
        rules.dense.match_features,
        any_start=not whole,
        # Single cuts are told from the model they are made in, whose weights training may have changed.
        reference=task.model if whole else None,
        weighs_tokens=rules.dense.weighs_tokens,
        remember=not whole,
    )
