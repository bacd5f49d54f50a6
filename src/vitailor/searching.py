"""`search`: the best sizes under a budget, found by judging candidates; and the model of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .budget import Budget
from .compression import compress
from .data import Data
from .errors import UsageError
from .methods import MultiDim
from .provenance import provenance_of
from .studies import Sampler


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        model: of the best candidate's sizes, as `compress` returns it.
        best: that candidate.
        trials: all candidates, of every worker: "number", "reward" (higher is better), "macs", "params", "policy"
            (sizes of each block by field; "fc1_rank" and "fc2_rank" where ranks are searched, None for one layer),
            "seconds".
        overhead_seconds: that this process spent on choosing candidates, storing and waiting.
    """

    model: nn.Module
    best: dict[str, Any]
    trials: list[dict[str, Any]]
    overhead_seconds: float


def search(
    model: nn.Module,
    budget: Budget,
    *,
    data: Data,
    method: MultiDim | None = None,
    trials: int | None = None,
    sampler: Sampler | None = None,
    storage: str | None = None,
    reward_images: int | None = None,
    **options: Any,
) -> Searched:
    """Search for the sizes of a model that harm least within a budget.

    Args:
        model: any supported model; left exactly as it is.
        budget: MACs or parameters, which every candidate meets.
        data: calibration images.
        method: what is searched, and how; `MultiDim()` by default.
        trials, sampler, storage, reward_images: settings of the method that win over its own, as options of
            `vitailor search` do.
        options: those of `compress`: reward, folder, seed, on_trial, ...

    Raises:
        UsageError: when the budget leaves nothing to search; else as `compress`.
    """
    asked: dict[str, Any] = {
        "trials": trials,
        "sampler": sampler,
        "storage": storage,
        "reward_images": reward_images,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    own = dict(method or MultiDim())
    small = compress(model, MultiDim(**(own | asked)), budget, data=data, **options)
    known = provenance_of(small)
    facts = known.record["facts"] if known is not None else {}
    if "trials" not in facts:
        raise UsageError(
            f"The model is within {budget} as it is.", "There is nothing to search: ask for less."
        )
    (best,) = [trial for trial in facts["trials"] if trial["number"] == facts["best"]]
    return Searched(small, best, facts["trials"], facts["overhead_seconds"])
