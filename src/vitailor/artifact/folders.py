"""Replacing a folder as a whole: whoever looks finds the old one or the new one, also after a kill."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArtifactError

AT_FDCWD = -100  # <fcntl.h>: relative paths start at the current folder
RENAME_EXCHANGE = 2  # <linux/fs.h>
STALE_SECONDS = 60  # a folder being filled may be this old before its lock is trusted to exist


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder to fill; when the `with` block ends well, it takes the place of `path`.

    The new folder is a sibling of `path`. Files of the old folder that the block did not write are
    carried over, so that overwriting never deletes what is not the writer's. When the block fails,
    nothing is left of the new folder and `path` is as before.

    Raises:
        ArtifactError: when `path` is no folder, is in use, is not empty (without `overwrite`), or
            cannot be written.
    """
    target = path.expanduser().resolve()
    new = target.parent / f"{_prefix(target)}new-{secrets.token_hex(4)}"
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _require_replaceable(target, overwrite)
        _sweep(target)
        new.mkdir()
        lock = _lock(new)
        yield new
        for file in new.iterdir():
            _sync(file)
        if target.exists():
            shutil.copymode(target, new)
            _carry_over(target, new)
        _sync(new)
        _put_in_place(new, target)
        _sync(target.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def current(path: Path) -> Path:
    """Where the folder `path` is to be read.

    That is `path` itself, except when a writer was killed between its two renames: then the old folder
    waits beside it. Nothing is changed, so that reading needs no right to write.
    """
    target = path.expanduser().resolve()
    aside = _aside(target)
    return aside if aside.is_dir() and not target.exists() else target


def cannot_write(path: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space or write elsewhere." if full else "Check the path and its permissions."
    return ArtifactError(f"Cannot write {path}: {reason}.", fix)


def _require_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file, not a folder.", "Choose another path.")
    require_elsewhere(target)
    if not overwrite and target.exists() and any(target.iterdir()):
        raise ArtifactError(
            f"{target} exists and is not empty.",
            "Choose another path or overwrite it (--overwrite).",
        )


def require_elsewhere(target: Path) -> None:
    """Refuse a folder that cannot be exchanged for another.

    Raises:
        ArtifactError: when it is the current folder or holds it.
    """
    here = Path.cwd()
    if target.expanduser().resolve() in (here, *here.parents):
        raise ArtifactError(
            f"{target} is the current folder or holds it, so it cannot be replaced.",
            "Name a subfolder.",
        )


def _put_in_place(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what was there ends up under the name `new` or is removed."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # Not one step here: a kill between the renames leaves the old folder aside, where `current`
        # and the next writer find it.
        aside = _aside(target)
        target.rename(aside)
        try:
            new.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where system, library or file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # an old C library
        return False
    names = os.fsencode(a), os.fsencode(b)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _recover(target: Path) -> None:
    """Finish what a writer killed between two renames began."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if target.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(target)


def _sweep(target: Path) -> None:
    """Remove half-written folders whose writers were killed: a living writer holds a lock."""
    for left in target.parent.iterdir():
        if not left.name.startswith(f"{_prefix(target)}new-"):
            continue
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < STALE_SECONDS:
                continue
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds a lock on the folder until it is closed; None if there is none."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _carry_over(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        copy = new / entry.name
        if copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(entry, copy)


def _link(source: str | Path, copy: str | Path) -> None:
    """A second name for a file, or a copy where the file system has no second names."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _sync(path: Path) -> None:
    """Have what was written reach the disk, so that no later rename overtakes it."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{target.name}.vitailor-"


def _aside(target: Path) -> Path:
    return target.parent / f"{_prefix(target)}old"
