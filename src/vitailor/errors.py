"""Every error vitailor raises on purpose.

VitailorError
├── UsageError               arguments that contradict each other or are out of range
├── UnsupportedModelError    a model, or a part of one, that vitailor cannot account for
├── PlanError                a plan or shape that is malformed or does not fit the model
├── BudgetError              a budget that no plan can meet
├── DataError                images that are absent, unreadable or of the wrong kind
├── WeightsError             weights that cannot be read or do not fit the model
├── TrainingError            training that went wrong: a loss that is not finite
└── ArtifactError            a folder that cannot be written, or is no artifact

A message says what is wrong and why; `fix` says how to mend it. The command line prints both on one
line and exits with code 1 (2 for a `UsageError`).
"""


class VitailorError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong and why, naming the thing.
        fix: how to mend it, as an instruction; empty when nothing sensible can be said.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".strip()


class UsageError(VitailorError):
    """Arguments that contradict each other or are out of range."""


class UnsupportedModelError(VitailorError):
    """A model, or a part of one, that vitailor cannot account for."""


class PlanError(VitailorError):
    """A plan or shape that is malformed or does not fit the model."""


class BudgetError(VitailorError):
    """A budget that no plan can meet."""


class DataError(VitailorError):
    """Images that are absent, unreadable or of the wrong kind."""


class WeightsError(VitailorError):
    """Weights that cannot be read or do not fit the model."""


class TrainingError(VitailorError):
    """Training that went wrong."""


class ArtifactError(VitailorError):
    """A folder that cannot be written, or is no artifact."""
