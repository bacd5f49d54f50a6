"""The compression methods: one short file each, which reads like the paper's algorithm."""

from .base import Method, Outcome, Task
from .closed_form import ClosedForm
from .token_merge import TokenMerge

#: Name on the command line -> configuration.
METHODS: dict[str, type[Method]] = {"closed-form": ClosedForm, "token-merge": TokenMerge}

__all__ = ["METHODS", "ClosedForm", "Method", "Outcome", "Task", "TokenMerge"]
