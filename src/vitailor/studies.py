"""Gaussian-process search with expected improvement, on Optuna: any number of workers, none of them needed.

The search of "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043), over directions in
a unit cube. A study in a journal file or a database holds every trial; workers on one or many machines that open
the same one share its trials out among them, and a worker that comes back goes on where the study stands:

* The initial design, by default even cuts first and then points of a Sobol sequence, is queued once, by the worker that
  makes the study.
* What a trial proposes follows from the study's seed, the trial's number and the trials finished before it, so
  that a restart repeats nothing.
* A worker tells while it works on a trial that it is alive. Trials of workers that no longer do are queued again.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy.stats import qmc

from .errors import UsageError

Sampler = Literal["gp", "random"]
#: Seconds between signs of life, and without one until a trial counts as abandoned.
BEAT, STALE = 10.0, 60.0
#: Seconds that a worker waits for others before it looks again.
PAUSE = 0.5
#: Seconds that the making of a study may take, before another worker finishes it.
PATIENCE = 10.0
ALIVE, READY = "alive", "ready"


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
        initial: trials of the initial design; by default as many as parameters and one more, at most half.
        first: the first trial's value of each parameter; by default 1, everything alike.
        on_trial: told about each trial that this worker has finished.
        stale: seconds without a sign of life after which a trial is queued again.

    Raises:
        UsageError: for numbers that make no sense, a storage that cannot be used, or a study of other parameters.
    """
    if trials < 1 or not names:
        raise UsageError(
            "There is nothing to search.", "Give at least one trial and one parameter."
        )
    count = min(len(names) + 1, max(1, trials // 2)) if initial is None else initial
    with _quiet():
        points = design(len(names), count, seed, first)
        found = _open(study, storage, names, sampler, seed, points)
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
                trial = found.ask({name: FloatDistribution(0, 1) for name in names})
                started = time.perf_counter()
                with _alive(trial):
                    value, facts = _asked(reward, found, trial)
                seconds = time.perf_counter() - started
                working += seconds
                trial.set_user_attr("seconds", seconds)
                trial.set_user_attr("facts", facts)
                found.tell(trial, value)
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
        return reward(dict(trial.params))
    except BaseException:  # also an interrupt
        _again(study, trial.number, trial.params)
        raise


def _open(
    name: str,
    storage: str | Path | None,
    names: Sequence[str],
    sampler: Sampler,
    seed: int,
    initial: Sequence[Sequence[float]],
) -> Study:
    """The study, with its initial design in the queue."""
    identity = {"parameters": list(names), "seed": seed, "sampler": sampler}
    own = _PerTrial(sampler, seed, len(initial))
    try:
        place = _storage(storage)
        try:
            study = optuna.create_study(
                study_name=name, storage=place, sampler=own, direction="maximize"
            )
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=place, sampler=own)
            _wait_until_ready(study)
    except Exception as error:
        raise UsageError(f"The storage {storage} cannot be used: {error}", "Check it.") from error
    known = study.user_attrs
    for key, value in identity.items():
        if known.get(key, value) != value:
            raise UsageError(
                f"The study '{name}' was begun with another {key}: {known[key]}, not {value}.",
                "Use the same settings, or another storage.",
            )
    if READY not in known:
        for key, value in identity.items():
            study.set_user_attr(key, value)
        # Whoever dies in the middle of it leaves it to the next, which queues only what is missing.
        for point in initial:
            study.enqueue_trial(dict(zip(names, point, strict=True)), skip_if_exists=True)
        study.set_user_attr(READY, True)
    return study


def _wait_until_ready(study: Study) -> None:
    """Give the worker that makes the study the time to queue its initial design."""
    patience = time.monotonic() + PATIENCE
    while READY not in study.user_attrs and time.monotonic() < patience:
        time.sleep(PAUSE)


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


def _storage(storage: str | Path | None) -> BaseStorage | str:
    if storage is None:
        return InMemoryStorage()
    if "://" in str(storage):
        return str(storage)
    file = Path(storage)
    file.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(file)))


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

    trial.set_user_attr(ALIVE, time.time())
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
        _again(study, trial.number, trial.params or trial.system_attrs.get("fixed_params", {}))


def _again(study: Study, number: int, params: Mapping[str, float]) -> None:
    """Give a trial up, and queue what it was about."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # another worker was faster
        return
    if params:
        study.enqueue_trial(dict(params), user_attrs={"again": number})


def _running(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _finished(study: Study) -> list[Finished]:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Finished(
            trial.number,
            dict(trial.params),
            float(trial.values[0]),
            trial.user_attrs["seconds"],
            trial.user_attrs["facts"],
        )
        for trial in done
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
