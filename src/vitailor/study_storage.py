"""Where a study is kept: in a journal file or a database that workers share, and one of them makes it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study

from .errors import UsageError

T = TypeVar("T")
#: Seconds that a worker waits for others, or for a storage, before it looks again; and how often it does the latter.
PAUSE, ATTEMPTS = 0.5, 4
#: Seconds without progress after which the making of a study is finished by another worker.
PATIENCE = 10.0
READY = "ready"
#: Who uses a database, and by which password: not to be shown.
PASSWORD = re.compile(r"://[^\s/]*@")


def open_study(
    name: str,
    storage: str | Path | None,
    sampler: BaseSampler,
    identity: Mapping[str, Any],
    initial: Sequence[Mapping[str, float]],
) -> Study:
    """The study of that name, made with an initial design in its queue if it is not there.

    Args:
        storage: a journal file, or the URL of a database that Optuna knows; None keeps the study in memory.
        identity: settings that must be as they were when the study was made.
        initial: values of parameters.

    Raises:
        UsageError: when the storage cannot be used, or the study was made with other settings.
    """

    def found() -> Study:
        place = _place(storage)
        try:
            return optuna.create_study(
                study_name=name, storage=place, sampler=sampler, direction="maximize"
            )
        except DuplicatedStudyError:
            known = optuna.load_study(study_name=name, storage=place, sampler=sampler)
            _wait_until_ready(known)
            return known

    try:
        # Whatever it is: two workers that begin on one database stand in each other's way.
        study = patiently(found, Exception)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        told = f"The storage {storage} cannot be used: {reason}"
        raise UsageError(PASSWORD.sub("://***@", told), "Check it.") from error
    known = study.user_attrs
    for key, value in identity.items():
        if known.get(key, value) != value:
            raise UsageError(
                f"The study '{name}' was begun with another {key}: {known[key]}, not {value}.",
                "Use the same settings, or another storage.",
            )

    def make() -> None:
        for key, value in identity.items():
            study.set_user_attr(key, value)
        # Whoever dies in the middle of it leaves it to the next, which queues only what is missing.
        for point in initial:
            study.enqueue_trial(dict(point), skip_if_exists=True)
        study.set_user_attr(READY, True)

    if READY not in known:
        patiently(make)
    return study


def patiently(
    action: Callable[[], T],
    hiccup: type[Exception] | tuple[type[Exception], ...] = (StorageInternalError, OSError),
) -> T:
    """What an action on a storage gives, which may be busy for a while."""
    for _ in range(ATTEMPTS - 1):
        try:
            return action()
        except hiccup:
            time.sleep(PAUSE)
    return action()


def _wait_until_ready(study: Study) -> None:
    """Give the worker that makes the study the time to queue its initial design."""
    queued, patience = -1, 0.0
    while READY not in study.user_attrs:
        now = len(study.get_trials(deepcopy=False))
        if now > queued:
            queued, patience = now, time.monotonic() + PATIENCE
        elif time.monotonic() > patience:
            return
        time.sleep(PAUSE)


def _place(storage: str | Path | None) -> BaseStorage | str:
    if storage is None:
        return InMemoryStorage()
    if "://" in str(storage):
        return str(storage)
    # Optuna's lock is a link to the path as it is given, which beside the journal would lead nowhere.
    file = Path(storage).expanduser().resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(_Journal(file))


class _Journal(JournalFileBackend):
    """A journal that goes on after a line that was never finished, as a full disk or a power cut leaves it: what is
    added to such a line could never be read."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, JournalFileSymlinkLock(str(file))
        super().__init__(str(file), lock_obj=self.lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self.lock.acquire()
        try:
            with self.file.open("rb+") as journal:
                end = journal.seek(0, os.SEEK_END)
                journal.seek(max(0, end - 1))
                if journal.read(1) not in (b"", b"\n"):
                    journal.seek(0)
                    journal.truncate(journal.read().rfind(b"\n") + 1)
                journal.seek(0, os.SEEK_END)
                journal.write(lines.encode())
                journal.flush()
                os.fsync(journal.fileno())
        finally:
            self.lock.release()
