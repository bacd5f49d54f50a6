"""The command line. Verbs are thin: they read options, call the library and print what it returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .console import complain, machine_readable, quiet_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process when None.

    Returns:
        exit code: 0, 2 for a usage error, 130 when interrupted, 1 for any other failure. A failure
        prints one line on stderr, or under `--json` one object on stdout; `--debug` adds the traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args and "--help" not in args
    debug = "--debug" in args
    with machine_readable(as_json), quiet_warnings(debug):
        # Interruption and broken pipes included: whatever happens ends in one line.
        try:
            from .app import run

            code = run(args)
            sys.stdout.flush()
        except BaseException as error:
            code = complain(error, as_json=as_json, debug=debug)
    return code
