"""Budgets as options."""

from __future__ import annotations

from math import inf
from typing import Annotated

import typer

from ..budget import Budget
from ..errors import UsageError
from . import options as o

_BUDGET = "Budget (exactly one)"

Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="F",
        help="Fraction of the MACs to keep; 1.0 changes nothing.",
        rich_help_panel=_BUDGET,
    ),
]
Macs = Annotated[
    str | None,
    typer.Option(
        "--macs",
        metavar="N",
        help="MACs: 750M, 1.2G, or a fraction.",
        rich_help_panel=_BUDGET,
    ),
]
Params = Annotated[
    str | None,
    typer.Option(
        "--params",
        metavar="N",
        help="Parameters: 22M, or a fraction.",
        rich_help_panel=_BUDGET,
    ),
]
LatencyMs = Annotated[
    float | None,
    typer.Option(
        "--latency-ms",
        metavar="MS",
        help="Median milliseconds for one image, on this device with these threads.",
        rich_help_panel=_BUDGET,
    ),
]


def make_budget(
    keep: float | None, macs: str | None, params: str | None, latency_ms: float | None
) -> Budget:
    """The budget that the options ask for.

    Raises:
        UsageError: unless exactly one is given and it is in range.
    """
    options = {"--keep": keep, "--macs": macs, "--params": params, "--latency-ms": latency_ms}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"Exactly one budget is needed, got {' and '.join(given) or 'none'}.",
            "Give one of --keep 0.6, --macs 750M, --params 0.5, --latency-ms 5.",
        )
    if keep is not None:
        if not 0 < keep <= 1:
            raise UsageError(
                f"--keep {keep:g} is not a fraction in (0, 1].",
                "Write for example --keep 0.6; --macs takes an absolute number.",
            )
        return Budget(macs=keep)
    if macs is not None:
        return Budget(macs=o.amount("--macs", macs))
    if params is not None:
        return Budget(params=o.amount("--params", params))
    if latency_ms is None or not 0 < latency_ms < inf:
        raise UsageError(f"--latency-ms {latency_ms:g} is no time.", "Give milliseconds.")
    return Budget(latency_ms=latency_ms)
