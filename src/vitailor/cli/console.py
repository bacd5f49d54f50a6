"""What the user sees: results on stdout, progress and errors on stderr. Lean: rich is imported on use."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import UsageError, VitailorError
from ..processes import is_first_process

if TYPE_CHECKING:
    from rich.console import Console

    from ..methods import OnTrial
    from ..training import Event

#: Called with what is done and the whole.
Progress = Callable[[int, int], None]

_results: list[TextIO] = []


# -- results -------------------------------------------------------------------------------------


@contextmanager
def machine_readable(as_json: bool) -> Iterator[None]:
    """Under `--json`, whatever libraries print goes to stderr, and only `emit` reaches stdout."""
    if not as_json:
        yield
        return
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def emit(payload: dict[str, Any], as_json: bool, draw: Callable[[Console], None]) -> None:
    """Print a command's result, as one JSON object or for people."""
    if as_json:
        stream = _results[-1] if _results else sys.stdout
        stream.write(json.dumps(payload, allow_nan=False) + "\n")
        stream.flush()
    else:
        draw(console())


def console() -> Console:
    """A rich console on stdout; a pipe gets whole lines, whatever the terminal's width."""
    from rich.console import Console

    if isinstance(sys.stdout, TextIO) or hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


# -- progress ------------------------------------------------------------------------------------


@contextmanager
def progress(what: str) -> Iterator[Progress | None]:
    """A progress bar on stderr when it is a terminal; else None."""
    with _bar(what) as move:
        yield None if move is None else lambda done, total: move(done, total, what)


@contextmanager
def trial_progress() -> Iterator[OnTrial | None]:
    """The same over the candidates of a search, with the best reward so far; a line for each where stderr is no
    terminal. Of several processes only the first is told anything."""
    with _bar("searching") as move:
        if not is_first_process():
            yield None
        elif move is None:
            yield _tell_candidate
        else:
            yield lambda done, total, best: move(done, total, f"searching, best {best:.4f}")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar that is moved by what is done, the whole, and a text; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)

        def move(done: int, total: int, text: str) -> None:
            bars.update(task, completed=done, total=total, description=text)

        yield move


@dataclass(frozen=True)
class Telling:
    """How a user is told of training, and of a search that goes before it."""

    event: Callable[[str, Event], None]
    trial: OnTrial


@contextmanager
def training_progress() -> Iterator[Telling]:
    """Tells how training goes: a bar on stderr when it is a terminal, else a line for each epoch. Of several
    processes only the first is told anything."""

    def silent(*_: object) -> None:
        pass

    if not is_first_process():
        yield Telling(silent, silent)
        return
    if not sys.stderr.isatty():
        yield Telling(_tell_epoch, _tell_candidate)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("training", total=None, facts="")
        last = ""

        def tell(stage: str, event: Event) -> None:
            nonlocal last
            if event.top1 is not None or event.observed:
                last = f"  {_outcome(event)}"
            bars.update(
                task,
                description=f"{stage} {_place(event)}",
                completed=event.update,
                total=event.updates,
                facts=_speed(event) + last,
            )

        def tell_trial(done: int, total: int, best: float) -> None:
            facts = f"best {best:.4f}"
            bars.update(task, description="searching", completed=done, total=total, facts=facts)

        yield Telling(tell, tell_trial)


def _tell_epoch(stage: str, event: Event) -> None:
    if event.update < event.updates:
        return
    outcome = event.top1 is not None or event.observed
    told = _outcome(event) if outcome else _speed(event)
    print(f"{stage} {_place(event)}  {told}", file=sys.stderr, flush=True)  # noqa: T201


def _tell_candidate(done: int, total: int, best: float) -> None:
    print(f"candidate {done}/{total}  best {best:.4f}", file=sys.stderr, flush=True)  # noqa: T201


def _place(event: Event) -> str:
    return f"epoch {event.epoch}/{event.epochs}" if event.epoch else "asking the teacher"


def _speed(event: Event) -> str:
    if not event.epoch:
        return f"{event.update}/{event.updates}"
    left = "" if math.isinf(event.seconds_left) else f"  {_clock(event.seconds_left)} left"
    return f"loss {event.loss:.4f}  {event.images_per_s:.1f} images/s{left}"


def _outcome(event: Event) -> str:
    top1 = [] if event.top1 is None else [f"top-1 {event.top1:.2f}%"]
    return "  ".join(top1 + [f"{name} {value:.4g}" for name, value in event.observed.items()])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def quiet_warnings(debug: bool) -> Iterator[None]:
    """Hide libraries' warnings, which are for developers, and print vitailor's own in one line.

    `--debug` or `python -W` shows all of them.
    """
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=r"vitailor\b")
            warnings.showwarning = _warn
        yield


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {_line(message)}", file=sys.stderr)  # noqa: T201


def complain(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Tell of an error in one line (or one JSON object) and return the exit code."""
    kind, message, fix, code = _explain(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    told = False
    if as_json and is_first_process():
        payload = {"error": {"type": kind, "message": message, "fix": fix}}
        with suppress(OSError):  # stdout itself may be what fails
            emit(payload, True, lambda _: None)
            told = True
    if not told:
        print(f"error: {message} {fix}".rstrip(), file=sys.stderr)  # noqa: T201
    _give_up_on_broken_stdout()
    return code


def _give_up_on_broken_stdout() -> None:
    """Python would complain once more, when it closes a stdout that takes no more bytes."""
    if sys.__stdout__ is not None:
        try:
            sys.__stdout__.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def _explain(error: BaseException) -> tuple[str, str, str, int]:
    """Type, message and fix of an error, and the exit code."""
    kind = type(error).__name__
    text = _line(error)
    if isinstance(error, VitailorError):
        code = 2 if isinstance(error, UsageError) else 1
        return kind, _line(error.message), _line(error.fix), code
    if isinstance(error, KeyboardInterrupt) or kind == "Abort":
        return "Interrupted", "Interrupted.", "", 130
    if hasattr(error, "format_message"):  # typer's own, which differ in class by version
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "vitailor"
        message = _sentence(error.format_message())
        return "UsageError", message, f"See '{command} --help'.", 2
    if isinstance(error, BrokenPipeError):
        return kind, "The output was closed before all was written.", "", 1
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        message = _sentence(f"Memory ran out: {text}".rstrip(": "))
        return "OutOfMemoryError", message, "Use a smaller model or batch.", 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return kind, f"{where}{error.strerror}.", _mend(error), 1
    fix = "This is a bug in vitailor or a library; run again with --debug for the traceback."
    return kind, _sentence(f"{kind}: {text}".rstrip(": ")), fix, 1


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _sentence(text: str) -> str:
    line = _line(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _mend(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "Correct the permissions, or choose another place."
    if isinstance(error, FileNotFoundError):
        return "Check the path."
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space, or write elsewhere."
    return ""
