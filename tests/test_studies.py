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
from typing import Any

import pytest

from vitailor import studies as s
from vitailor.errors import UsageError

NAMES = ("a", "b", "c")


def bowl(direction: dict[str, float]) -> tuple[float, dict[str, Any]]:
    """Highest, 0, at (0.2, 0.5, 0.8)."""
    pairs = zip(direction.values(), (0.2, 0.5, 0.8), strict=True)
    return -sum((x - best) ** 2 for x, best in pairs), {"asked": sorted(direction)}


def points(result: s.Result) -> list[tuple[float, ...]]:
    return [tuple(trial.direction.values()) for trial in result.trials]


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_cut_off_and_begun_again_is_uninterrupted(sampler, tmp_path):
    more = {"study": "x", "seed": 3, "sampler": sampler, "initial": 3}
    whole = s.search(bowl, NAMES, trials=8, **more)
    file = tmp_path / "deep" / "journal.log"
    first = s.search(bowl, NAMES, trials=5, storage=file, **more)
    rest = s.search(bowl, NAMES, trials=8, storage=file, **more)
    assert points(first) == points(whole)[:5]
    assert points(rest) == points(whole)
    assert len(set(points(whole))) == 8
    assert [t.reward for t in rest.trials] == [t.reward for t in whole.trials]
    assert (first.own, rest.own) == ([0, 1, 2, 3, 4], [5, 6, 7])
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
    s.BEAT = 0.2
    def reward(direction):
        with open(sys.argv[2], "a") as log:
            log.write(json.dumps([os.getpid(), *direction.values()]) + "\\n")
        time.sleep(float(sys.argv[3]))
        return -sum(x * x for x in direction.values()), {}
    found = s.search(reward, ("a", "b"), trials=6, study="x", storage=sys.argv[1], initial=3, stale=6.0)
    print(json.dumps([t.number for t in found.trials]))
    """
)


def worker(folder: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, folder / "journal.log", folder / "asked", str(pause)],
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
    with pytest.raises(UsageError, match="another seed"):
        s.search(bowl, NAMES, trials=1, study="x", storage=file, seed=1)
    with pytest.raises(UsageError, match="another parameters"):
        s.search(bowl, ("a", "b"), trials=1, study="x", storage=file)
