"""The compression methods: one short file each, which reads like the paper's algorithm."""

from .base import Method, OnEvent, OnTrial, Outcome, Task
from .closed_form import ClosedForm
from .hybrid import Hybrid
from .low_rank import LowRank
from .multi_dim import MultiDim
from .token_merge import TokenMerge
from .vtp import VTP

#: Name on the command line -> configuration.
METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (ClosedForm, TokenMerge, VTP, LowRank, Hybrid, MultiDim)
}

__all__ = [
    "METHODS",
    "VTP",
    "ClosedForm",
    "Hybrid",
    "LowRank",
    "Method",
    "MultiDim",
    "OnEvent",
    "OnTrial",
    "Outcome",
    "Task",
    "TokenMerge",
]
