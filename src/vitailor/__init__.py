"""vitailor: cut a trained Vision Transformer to a budget; get back a smaller, faster plain model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use, so that `import vitailor` needs no torch. No module
# of the package may be called like a public name: importing it would put it in that name's place.
_HOMES = {
    "Accuracy": "evaluation",
    "ArtifactError": "errors",
    "BenchResult": "benchmarking",
    "Budget": "budget",
    "BudgetError": "errors",
    "ClosedForm": "methods",
    "DataError": "errors",
    "Hybrid": "methods",
    "LowRank": "methods",
    "MultiDim": "methods",
    "Plan": "plan",
    "PlanError": "errors",
    "Preprocessing": "preprocessing",
    "TokenMerge": "methods",
    "TrainConfig": "training",
    "TrainingError": "errors",
    "UnsupportedModelError": "errors",
    "UsageError": "errors",
    "VTP": "methods",
    "ViTShape": "shape",
    "VitailorError": "errors",
    "WeightsError": "errors",
    "bench": "benchmarking",
    "compress": "compression",
    "evaluate": "evaluation",
    "from_pretrained": "artifact",
    "inspect": "inspection",
    "load": "artifact",
    "merge_back": "surgery",
    "paired_difference": "evaluation",
    "push_to_hub": "artifact",
    "report": "reporting",
    "save": "artifact",
    "search": "searching",
    "shape_of": "hosts",
    "train": "trainer",
}

if TYPE_CHECKING:
    from .artifact import from_pretrained, load, push_to_hub, save
    from .benchmarking import BenchResult, bench
    from .budget import Budget
    from .compression import compress
    from .errors import (
        ArtifactError,
        BudgetError,
        DataError,
        PlanError,
        TrainingError,
        UnsupportedModelError,
        UsageError,
        VitailorError,
        WeightsError,
    )
    from .evaluation import Accuracy, evaluate, paired_difference
    from .hosts import shape_of
    from .inspection import inspect
    from .methods import VTP, ClosedForm, Hybrid, LowRank, MultiDim, TokenMerge
    from .plan import Plan
    from .preprocessing import Preprocessing
    from .reporting import report
    from .searching import search
    from .shape import ViTShape
    from .surgery import merge_back
    from .trainer import train
    from .training import TrainConfig

__all__ = [
    "VTP",
    "Accuracy",
    "ArtifactError",
    "BenchResult",
    "Budget",
    "BudgetError",
    "ClosedForm",
    "DataError",
    "Hybrid",
    "LowRank",
    "MultiDim",
    "Plan",
    "PlanError",
    "Preprocessing",
    "TokenMerge",
    "TrainConfig",
    "TrainingError",
    "UnsupportedModelError",
    "UsageError",
    "ViTShape",
    "VitailorError",
    "WeightsError",
    "bench",
    "compress",
    "evaluate",
    "from_pretrained",
    "inspect",
    "load",
    "merge_back",
    "paired_difference",
    "push_to_hub",
    "report",
    "save",
    "search",
    "shape_of",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitailor' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
