"""Search over a unit cube: what workers share, what survives, what is never repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from vitailor import studies as s
from vitailor import study_storage
from vitailor.errors import UsageError

NAMES = ("a", "b", "c")


def bowl(direction: dict[str, float]) -> tuple[float, dict[str, Any]]:
    """Highest, 0, at (0.2, 0.5, 0.8)."""
    pairs = zip(direction.values(), (0.2, 0.5, 0.8), strict=True)
    return -sum((x - best) ** 2 for x, best in pairs), {"asked": sorted(direction)}


def points(result: s.Result) -> list[tuple[float, ...]]:
    return [tuple(trial.direction.values()) for trial in result.trials]


@pytest.mark.parametrize("sampler", ["gp", "random"])
@pytest.mark.parametrize("initial", [3, None])
def test_cut_off_and_begun_again_is_uninterrupted(sampler, initial, tmp_path):
    more = {"study": "x", "seed": 3, "sampler": sampler, "initial": initial}
    whole = s.search(bowl, NAMES, trials=8, **more)
    file = tmp_path / "deep" / "journal.log"
    s.search(bowl, NAMES, trials=2, storage=file, **more)
    first = s.search(bowl, NAMES, trials=5, storage=file, **more)
    rest = s.search(bowl, NAMES, trials=8, storage=file, **more)
    assert points(first) == points(whole)[:5]
    assert points(rest) == points(whole)
    assert len(set(points(whole))) == 8
    assert [t.reward for t in rest.trials] == [t.reward for t in whole.trials]
    assert (first.own, rest.own) == ([2, 3, 4], [5, 6, 7])
    assert all(trial.facts == {"asked": list(NAMES)} for trial in rest.trials)
    again = s.search(bowl, NAMES, trials=8, storage=file, **more)
    assert again.own == []
    assert points(s.search(bowl, NAMES, trials=8, **(more | {"seed": 4}))) != points(whole)


def test_the_initial_design_comes_first_and_once(tmp_path):
    file = tmp_path / "journal.log"
    for _ in range(2):
        found = s.search(bowl, NAMES, trials=6, study="x", storage=file, initial=4)
    expected = [tuple(point) for point in s.design(3, 4, 0)]
    assert points(found)[:4] == expected
    assert expected[0] == (1.0, 1.0, 1.0)
    assert len(set(points(found))) == 6


def test_expected_improvement_finds_more_than_chance():
    best = {
        sampler: [
            s.search(bowl, NAMES, trials=16, study="x", seed=seed, sampler=sampler).best.reward
            for seed in range(2)
        ]
        for sampler in ("gp", "random")
    }
    assert min(best["gp"]) > max(best["random"])
    assert min(best["gp"]) > -1e-2


def test_the_best_is_the_first_of_the_highest():
    found = s.search(lambda d: (1.0, {}), NAMES, trials=4, study="x")
    assert found.best.number == 0


def test_what_is_told():
    seen: list[tuple[int, int]] = []
    result = s.search(
        bowl,
        NAMES,
        trials=4,
        study="x",
        on_trial=lambda t, r: seen.append((t.number, len(r.trials))),
    )
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert result.overhead_seconds > 0


WORKER = textwrap.dedent(
    """
    import json, os, sys, time
    from vitailor import studies as s
    s.BEAT, pause, stale, trials = map(float, sys.argv[3:])
    def reward(direction):
        with open(sys.argv[2], "a") as log:
            log.write(json.dumps([os.getpid(), *direction.values()]) + "\\n")
        time.sleep(pause)
        return -sum(x * x for x in direction.values()), {}
    found = s.search(
        reward, ("a", "b"), trials=int(trials), study="x", storage=sys.argv[1], initial=3, stale=stale
    )
    print(json.dumps([t.number for t in found.trials]))
    """
)


def worker(
    folder: Path,
    pause: float,
    *,
    stale: float = 6.0,
    trials: int = 6,
    storage: str | Path = "journal.log",
) -> subprocess.Popen[str]:
    numbers = [str(number) for number in (0.2, pause, stale, trials)]
    place = storage if "://" in str(storage) else folder / storage
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, place, folder / "asked", *numbers],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def asked(folder: Path) -> list[list[float]]:
    file = folder / "asked"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_killed_workers_trial_is_done_by_another_and_nothing_is_repeated(tmp_path):
    dead = worker(tmp_path, 60.0)
    deadline = time.monotonic() + 60
    while not asked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    (lost,) = asked(tmp_path)
    pair = [worker(tmp_path, 0.1) for _ in range(2)]
    finished = [json.loads(process.communicate(timeout=120)[0]) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert finished[0] == finished[1]
    assert len(finished[0]) == 6
    assert 0 not in finished[0]  # the one that was given up
    after = [point for _, *point in asked(tmp_path)[1:]]
    assert after.count(lost[1:]) == 1  # the lost one, once
    assert len({tuple(point) for point in after}) == len(after) == 6


def test_a_trial_that_takes_long_is_not_given_up_while_its_worker_lives(tmp_path):
    slow = worker(tmp_path, 6.0, stale=3.0, trials=1)
    deadline = time.monotonic() + 60
    while not asked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    other = worker(tmp_path, 0.0, stale=3.0, trials=1)
    finished = [json.loads(process.communicate(timeout=120)[0]) for process in (slow, other)]
    assert finished == [[0], [0]]
    assert len(asked(tmp_path)) == 1


def test_workers_that_begin_together_share_one_database(tmp_path):
    place = f"sqlite:///{tmp_path}/study.db"
    pair = [worker(tmp_path, 0.05, storage=place) for _ in range(2)]
    finished = [json.loads(process.communicate(timeout=120)[0]) for process in pair]
    assert finished[0] == finished[1]
    assert len(finished[0]) == 6
    done = [tuple(point) for _, *point in asked(tmp_path)]
    assert len(set(done)) == len(done) == 6
    assert set(done) >= {tuple(point) for point in s.design(2, 3, 0)}


def test_a_worker_that_comes_too_late_for_the_last_trial_withdraws(tmp_path, monkeypatch):
    file = tmp_path / "journal.log"
    s.search(bowl, NAMES, trials=1, study="x", storage=file)
    place = JournalStorage(JournalFileBackend(str(file)))
    other = optuna.load_study(study_name="x", storage=place).ask()
    other.set_user_attr(s.ALIVE, time.time())
    real, looks = s._running, []

    def unseen_at_first(study):  # the other worker asked after this one had looked
        looks.append(None)
        return [] if len(looks) <= 2 else real(study)

    monkeypatch.setattr(s, "_running", unseen_at_first)
    calls = []

    def counted(direction):
        calls.append(direction)
        return bowl(direction)

    found = s.search(counted, NAMES, trials=2, study="x", storage=file, stale=2.0)
    assert len(found.trials) == 2
    assert len(calls) == 1
    states = [t.state.name for t in optuna.load_study(study_name="x", storage=place).trials]
    # The other's, which nobody ever finished, and the one that was too late: either is done afterwards.
    assert states[:3] == ["COMPLETE", "FAIL", "FAIL"]


@pytest.mark.parametrize("told", [True, False])
def test_a_reward_that_is_no_number_ends_the_search(told):
    on_trial = (lambda trial, result: None) if told else None
    with pytest.raises(UsageError, match="reward of candidate 0 is nan"):
        s.search(lambda d: (float("nan"), {}), NAMES, trials=3, study="x", on_trial=on_trial)


def test_a_storage_that_is_busy_for_a_moment_ends_nothing(monkeypatch):
    monkeypatch.setattr(s, "BEAT", 0.05)
    monkeypatch.setattr(study_storage, "PAUSE", 0.01)
    real, names = optuna.trial.Trial.set_user_attr, []

    def busy(trial, name, value):
        names.append(name)
        if names.count(name) in (1, 3):
            raise StorageInternalError("database is locked")
        real(trial, name, value)

    monkeypatch.setattr(optuna.trial.Trial, "set_user_attr", busy)

    def slow(direction):
        time.sleep(0.6)
        return bowl(direction)

    found = s.search(slow, NAMES, trials=2, study="x")
    assert len(found.trials) == len(found.own) == 2
    assert names.count(s.ALIVE) > 8  # beats went on after the one that failed


def test_a_line_that_was_torn_off_is_left_out(tmp_path):
    file = tmp_path / "journal.log"
    whole = s.search(bowl, NAMES, trials=6, study="x")
    s.search(bowl, NAMES, trials=3, study="x", storage=file)
    with file.open("ab") as journal:
        journal.write(b'{"op_code":5,"work')
    for _ in range(2):
        assert points(s.search(bowl, NAMES, trials=6, study="x", storage=file)) == points(whole)


def test_a_full_disk_leaves_a_journal_that_can_be_read(tmp_path):
    file = tmp_path / "journal.log"
    torn = []

    def tears(direction):
        with file.open("ab") as journal:  # as a write that could not be finished does
            journal.write(b'{"op_code":5,"work')
        torn.append(None)
        return bowl(direction)

    found = s.search(tears, NAMES, trials=4, study="x", storage=file)
    assert len(torn) == 4
    assert points(s.search(bowl, NAMES, trials=4, study="x", storage=file)) == points(found)


def test_a_trial_that_was_given_up_before_it_began_is_left_to_others(monkeypatch):
    real, asked_for = optuna.Study.ask, []

    def slow(study, *more, **named):
        trial = real(study, *more, **named)
        asked_for.append(trial.number)
        if len(asked_for) == 1:  # so slow that another worker took it for dead
            s._again(study, trial.number, trial.params)
        return trial

    monkeypatch.setattr(optuna.Study, "ask", slow)
    found = s.search(bowl, NAMES, trials=3, study="x", initial=2)
    assert asked_for[0] not in [trial.number for trial in found.trials]
    assert points(found)[1] == (1.0, 1.0, 1.0)


def test_locks_lead_to_the_journal_from_anywhere(tmp_path, monkeypatch):
    # Optuna tells by what its link leads to whether the process that made it is gone.
    monkeypatch.chdir(tmp_path)
    real, targets = os.symlink, []

    def seen(target, link, *more):
        targets.append(target)
        real(target, link, *more)

    monkeypatch.setattr(os, "symlink", seen)
    s.search(bowl, NAMES, trials=1, study="x", storage="deep/journal.log")
    assert {Path(target) for target in targets} == {tmp_path / "deep" / "journal.log"}


def begin(file: Path, count: int) -> optuna.Study:
    """A study whose maker has queued so many points, and is not ready."""
    place = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(study_name="x", storage=place, direction="maximize")
    for point in s.design(3, 4, 0)[:count]:
        study.enqueue_trial(dict(zip(NAMES, point, strict=True)))
    return study


def test_the_making_of_a_study_is_finished_by_whoever_comes_next(tmp_path, monkeypatch):
    monkeypatch.setattr(study_storage, "PATIENCE", 0.2)
    begin(tmp_path / "journal.log", 2)
    found = s.search(bowl, NAMES, trials=5, study="x", storage=tmp_path / "journal.log")
    assert points(found)[:4] == [tuple(point) for point in s.design(3, 4, 0)]
    assert len(set(points(found))) == 5


def test_the_making_of_a_study_may_take_its_time(tmp_path, monkeypatch):
    study = begin(tmp_path / "journal.log", 1)
    left = [dict(zip(NAMES, point, strict=True)) for point in s.design(3, 4, 0)[1:]]
    clock = [0.0]

    def makes_some(
        seconds,
    ):  # another worker, of which most of the patience passes between two points
        clock[0] += 0.8 * study_storage.PATIENCE
        if left:
            study.enqueue_trial(left.pop(0))
        else:
            study.set_user_attr(study_storage.READY, True)

    monkeypatch.setattr(
        study_storage, "time", SimpleNamespace(sleep=makes_some, monotonic=lambda: clock[0])
    )
    found = s.search(bowl, NAMES, trials=4, study="x", storage=tmp_path / "journal.log")
    assert points(found) == [tuple(point) for point in s.design(3, 4, 0)]
    assert len(study.trials) == 4


def test_what_was_given_up_and_not_queued_again_is_done(tmp_path):
    study = begin(tmp_path / "journal.log", 4)
    study.set_user_attr(study_storage.READY, True)
    study.tell(study.ask().number, state=optuna.trial.TrialState.FAIL)
    file = tmp_path / "journal.log"
    early = s.search(bowl, NAMES, trials=3, study="x", storage=file)  # it may still be queued
    assert [trial.number for trial in early.trials] == [1, 2, 3]
    found = s.search(bowl, NAMES, trials=4, study="x", storage=file, stale=0.0)
    assert sorted(points(found)) == sorted(tuple(point) for point in s.design(3, 4, 0))


def test_what_two_workers_queued_again_is_done_once(tmp_path):
    study = begin(tmp_path / "journal.log", 4)
    study.set_user_attr(study_storage.READY, True)
    lost = study.ask()
    study.tell(lost.number, state=optuna.trial.TrialState.FAIL)
    params = dict(zip(NAMES, s.design(3, 4, 0)[0], strict=True))
    for _ in range(2):
        study.enqueue_trial(params, user_attrs={s.AGAIN: lost.number})
    file = tmp_path / "journal.log"
    for trials in (4, 5, 6):  # a worker that comes later does not take the twin for lost, either
        found = s.search(bowl, NAMES, trials=trials, study="x", storage=file, stale=0.0)
        assert len(set(points(found))) == trials
    assert set(points(found)) >= {tuple(point) for point in s.design(3, 4, 0)}


def test_an_error_in_a_trial_loses_nothing(tmp_path):
    file = tmp_path / "journal.log"
    calls: list[dict[str, float]] = []

    def fails_once(direction: dict[str, float]) -> tuple[float, dict[str, Any]]:
        calls.append(direction)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return bowl(direction)

    with pytest.raises(RuntimeError, match="out of memory"):
        s.search(fails_once, NAMES, trials=5, study="x", storage=file)
    found = s.search(fails_once, NAMES, trials=5, study="x", storage=file)
    assert len(found.trials) == 5
    assert calls.count(calls[1]) == 2


def test_what_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to search"):
        s.search(bowl, NAMES, trials=0, study="x")
    with pytest.raises(UsageError, match="cannot be used"):
        s.search(bowl, NAMES, trials=1, study="x", storage="nosuch://place")
    file = tmp_path / "journal.log"
    s.search(bowl, NAMES, trials=1, study="x", storage=file)
    with pytest.raises(UsageError, match="another initial"):
        s.search(bowl, NAMES, trials=1, study="x", storage=file, initial=2)
    with pytest.raises(UsageError, match="another seed"):
        s.search(bowl, NAMES, trials=1, study="x", storage=file, seed=1)
    with pytest.raises(UsageError, match="another parameters"):
        s.search(bowl, ("a", "b"), trials=1, study="x", storage=file)
