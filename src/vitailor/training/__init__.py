"""One training loop for everything that trains: fine-tuning, distillation and sparse training with gates."""

from __future__ import annotations

from .config import TrainConfig
from .images import Augmentation
from .loop import fit
from .prepare import require_float32
from .progress import Event, TrainResult

__all__ = ["Augmentation", "Event", "TrainConfig", "TrainResult", "fit", "require_float32"]
