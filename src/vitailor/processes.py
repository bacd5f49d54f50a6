"""Which of several processes this is, known without torch and before they have found each other."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the only process, or the first that a launcher started: the one that writes and tells."""
    return os.environ.get("RANK", "0") == "0"
