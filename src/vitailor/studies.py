"""Gaussian-process search with expected improvement, on Optuna: any number of workers, none of them needed.

The search of "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043), over directions in
a unit cube. A study in a journal file or a database holds every trial; workers on one or many machines that open
the same one share its trials out among them, and a worker that comes back goes on where the study stands:

* The initial design, by default even cuts first and then points of a Sobol sequence, is queued once, by the worker that
  makes the study.
* What a trial proposes follows from the study's seed, the trial's number and the trials finished and under way
  before it, so that a restart repeats nothing.
* A worker tells while it works on a trial that it is alive. Trials of workers that no longer do are queued again.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy.stats import qmc

from .errors import UsageError
from .study_storage import PAUSE, open_study, patiently

Sampler = Literal["gp", "random"]
#: Seconds between signs of life, and without one until a trial counts as abandoned.
BEAT, STALE = 10.0, 60.0
#: Names under which a trial holds what is not its own to Optuna.
ALIVE, AGAIN, FACTS, SECONDS = "alive", "again", "facts", "seconds"


@dataclass(frozen=True)
class Finished:
    """A finished trial.

    Attributes:
        number: in the order in which trials were begun.
        direction: value of each parameter, from 0 to 1.
        reward: higher is better.
        seconds: that it took.
        facts: what the reward's function told besides.
    """

    number: int
    direction: dict[str, float]
    reward: float
    seconds: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a study holds, and what this worker did of it.

    Attributes:
        trials: finished ones, by number.
        own: numbers of those that this worker did.
        overhead_seconds: that this worker spent on choosing, storing and waiting.
    """

    trials: list[Finished]
    own: list[int]
    overhead_seconds: float

    @property
    def best(self) -> Finished:
        """The first of the highest reward."""
        return max(self.trials, key=lambda trial: (trial.reward, -trial.number))


#: Gives a direction's reward and facts about it, as JSON knows them.
Reward = Callable[[dict[str, float]], tuple[float, dict[str, Any]]]


def search(
    reward: Reward,
    names: Sequence[str],
    *,
    trials: int,
    study: str,
    storage: str | Path | None = None,
    sampler: Sampler = "gp",
    seed: int = 0,
    initial: int | None = None,
    first: Sequence[float] | None = None,
    on_trial: Callable[[Finished, Result], None] | None = None,
    stale: float = STALE,
) -> Result:
    """Search the unit cube for the direction of the highest reward.

    Args:
        reward: of a direction; deterministic.
        names: of the parameters.
        trials: finished trials that the study is to have, those of other workers and earlier runs included.
        study: its name. What must not be mixed, say two models, needs two names.
        storage: a journal file, or the URL of a database that Optuna knows; None keeps the study in memory.
        sampler: "gp" models rewards as a Gaussian process and proposes where improvement is expected most,
            "random" draws evenly.
        initial: trials of the initial design; by default as many as parameters and one more.
        first: the first trial's value of each parameter; by default 1, everything alike.
        on_trial: told about each trial that this worker has finished.
        stale: seconds without a sign of life after which a trial is queued again.

    Raises:
        UsageError: for numbers that make no sense, a storage that cannot be used, a study of other parameters, or a
            reward that is not finite.
    """
    if trials < 1 or not names:
        raise UsageError(
            "There is nothing to search.", "Give at least one trial and one parameter."
        )
    # Not by the number of trials, which may grow: the study would be another one.
    count = len(names) + 1 if initial is None else initial
    identity = {"parameters": list(names), "seed": seed, "sampler": sampler, "initial": count}
    points = [dict(zip(names, p, strict=True)) for p in design(len(names), count, seed, first)]
    with _quiet():
        found = open_study(study, storage, _PerTrial(sampler, seed, count), identity, points)
        _adopt(found, stale)
        own: list[int] = []
        began, working = time.perf_counter(), 0.0
        while True:
            _requeue(found, stale)
            if len(_finished(found)) >= trials:
                break
            if len(_finished(found)) + len(_running(found)) >= trials:
                time.sleep(PAUSE)  # others are at work on what is left; should one die, it is ours
                continue
            try:
                trial = patiently(
                    lambda: found.ask({name: FloatDistribution(0, 1) for name in names})
                )
                if _repeats(found, trial):
                    _give_up(found, trial.number)
                    continue
                if _crowded(found, trial, trials):
                    _again(found, trial.number, trial.params)
                    continue
                started = time.perf_counter()
                with _alive(trial):
                    value, facts = _asked(reward, found, trial)
                seconds = time.perf_counter() - started
                working += seconds
                _store(found, trial, value, facts | {SECONDS: seconds})
            except UpdateFinishedTrialError:
                continue  # no sign of life came through for so long that another has queued it again
            own.append(trial.number)
            if on_trial is not None:
                done = _finished(found)
                spent = time.perf_counter() - began - working
                (mine,) = [one for one in done if one.number == trial.number]
                on_trial(mine, Result(done, own, spent))
        return Result(_finished(found), own, time.perf_counter() - began - working)


def _asked(reward: Reward, study: Study, trial: Trial) -> tuple[float, dict[str, Any]]:
    """The reward of a trial; should it not come, the trial is queued again."""
    try:
        value, facts = reward(dict(trial.params))
        if not math.isfinite(value):
            raise UsageError(
                f"The reward of candidate {trial.number} is {value}.",
                "See that the model's outputs are finite on these images.",
            )
        return value, facts
    except BaseException:  # also an interrupt
        with suppress(Exception):  # what went wrong first is what is told
            _again(study, trial.number, trial.params)
        raise


def _crowded(study: Study, trial: Trial, trials: int) -> bool:
    """Whether trials begun before this one are enough: several workers may see the same one missing."""
    others = _trials(study, TrialState.COMPLETE, TrialState.RUNNING)
    return sum(other.number < trial.number for other in others) >= trials


def _store(study: Study, trial: Trial, value: float, facts: dict[str, Any]) -> None:
    """Put a trial's outcome into the study.

    Raises:
        UpdateFinishedTrialError: when another worker has given it up.
    """

    def store() -> None:
        trial.set_user_attr(FACTS, facts)
        study.tell(trial, value)

    patiently(store)


def design(
    parameters: int, count: int, seed: int, first: Sequence[float] | None = None
) -> list[list[float]]:
    """The initial design: a first point, by default everything cut alike, then points of a scrambled Sobol
    sequence."""
    if count < 1:
        return []
    # Drawn in powers of two, as the sequence wants it.
    points = qmc.Sobol(parameters, seed=seed).random_base2((count - 1).bit_length())
    return [list(first or [1.0] * parameters), *points[: count - 1].tolist()]


class _PerTrial(BaseSampler):
    """A sampler that is made anew for each trial, from the study's seed and the trial's number."""

    def __init__(self, kind: Sampler, seed: int, initial: int) -> None:
        self.kind, self.seed, self.initial = kind, seed, initial

    def _own(self, trial: FrozenTrial) -> BaseSampler:
        seed = int(np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0])
        if self.kind == "random":
            return RandomSampler(seed=seed)
        return GPSampler(seed=seed, n_startup_trials=self.initial, deterministic_objective=True)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._own(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._own(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        # Each parameter is drawn with a sampler of its own: all would else be the same number.
        position = sorted(study.user_attrs["parameters"]).index(param_name)
        drawn = np.random.default_rng((self.seed, trial.number, position)).random()
        return float(drawn)


# -- who is alive ----------------------------------------------------------------------------------


@contextmanager
def _alive(trial: Trial) -> Iterator[None]:
    """Signs of life from the beginning of a trial to its end."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            try:
                trial.set_user_attr(ALIVE, time.time())
            except UpdateFinishedTrialError:  # given up by another worker
                return
            except Exception:  # a storage that is busy: the next beat may get through
                continue

    patiently(lambda: trial.set_user_attr(ALIVE, time.time()))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _requeue(study: Study, stale: float) -> None:
    """Queue the trials of dead workers again; each of them once, whoever notices first."""
    for trial in _running(study):
        started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        if time.time() - trial.user_attrs.get(ALIVE, started) < stale:
            continue
        _again(study, trial.number, _params(trial))


def _adopt(study: Study, stale: float) -> None:
    """Queue what a worker gave up and, killed in between, did not queue again."""
    known = _trials(study)
    queued = {trial.user_attrs.get(AGAIN) for trial in known}
    for trial in known:
        ended = trial.datetime_complete
        long_ago = ended is not None and time.time() - ended.timestamp() > stale
        lost = trial.state is TrialState.FAIL and trial.number not in queued
        if lost and long_ago and not _repeats(study, trial):
            _queue(study, trial.number, _params(trial))


def _repeats(study: Study, trial: Trial | FrozenTrial) -> bool:
    """Whether this was queued for a trial that was given up, and so was another before it: two workers that come in
    the same moment may both find that one missing."""
    given_up = trial.user_attrs.get(AGAIN)
    return given_up is not None and any(
        other.number < trial.number and other.user_attrs.get(AGAIN) == given_up
        for other in _trials(study)
    )


def _params(trial: FrozenTrial) -> Mapping[str, float]:
    """What a trial is about, or is to be."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _again(study: Study, number: int, params: Mapping[str, float]) -> None:
    """Give a trial up, and queue what it was about."""
    if _give_up(study, number):
        _queue(study, number, params)


def _give_up(study: Study, number: int) -> bool:
    """Whether the trial is given up by this worker, and no other was faster."""
    try:
        patiently(lambda: study.tell(number, state=TrialState.FAIL))
    except (ValueError, UpdateFinishedTrialError):
        return False
    return True


def _queue(study: Study, number: int, params: Mapping[str, float]) -> None:
    if params:
        patiently(lambda: study.enqueue_trial(dict(params), user_attrs={AGAIN: number}))


def _running(study: Study) -> list[FrozenTrial]:
    return _trials(study, TrialState.RUNNING)


def _trials(study: Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials in these states, or all."""
    return patiently(lambda: study.get_trials(deepcopy=False, states=states or None))


def _finished(study: Study) -> list[Finished]:
    return [
        Finished(
            trial.number,
            dict(trial.params),
            float(trial.values[0]),
            trial.user_attrs[FACTS][SECONDS],
            {name: fact for name, fact in trial.user_attrs[FACTS].items() if name != SECONDS},
        )
        for trial in _trials(study, TrialState.COMPLETE)
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own progress and its warnings of what is experimental there."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
