"""Checkpoints: written whole or not at all, and read without running code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, UsageError
from .config import TrainConfig

LAST, BEST = "last.pt", "best.pt"


def save(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its place and move it there, so that a killed process leaves the old one
    or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
    finally:
        partial.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove the checkpoints of an earlier training, from which nobody must go on."""
    for name in (LAST, BEST):
        (folder / name).unlink(missing_ok=True)


def load(
    folder: Path, name: str, identity: Mapping[str, Any], processes: int
) -> dict[str, Any] | None:
    """The checkpoint of that name, or None where there is none.

    Args:
        identity: what must be the same to go on, as it was saved.

    Raises:
        DataError: when it cannot be read.
        UsageError: when it was made with other settings or another number of processes, so that going on
            would not be the same training.
    """
    path = folder / name
    if not path.exists():
        return None
    state = _read(path)
    before = state["identity"]
    changed = [key for key, value in identity.items() if before.get(key) != value]
    if changed:
        what, old, new = _differs(changed[0], before.get(changed[0]), identity[changed[0]])
        raise UsageError(
            f"{path} was made with another {what}: {old}, not {new}.",
            "Resume with the same settings, or train into another folder.",
        )
    if state["processes"] != processes:
        raise UsageError(
            f"{path} was made by {state['processes']} processes, not {processes}.",
            "Resume with as many processes.",
        )
    return state


def _differs(what: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """What differs, and how: of many settings only the first that does."""
    while isinstance(before, dict) and isinstance(now, dict):
        known = {*before, *now}
        what = min(key for key in known if before.get(key) != now.get(key))
        before, now = before.get(what), now.get(what)
    return what, before, now


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read: {reason}", "Remove it to start anew.") from error
    return state


def settings(config: TrainConfig) -> dict[str, Any]:
    """What must be the same to go on; how often is saved, read and reported may differ."""
    free = {"checkpoint_every", "workers", "tracker"}
    return config.model_dump(mode="json", exclude=free)
