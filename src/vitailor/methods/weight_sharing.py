"""Weights shared by all policies of a budget, before one of them is chosen.

The minimum over W of the expected loss over policies, of "Multi-Dimensional Model Compression of Vision Transformer"
(arXiv 2201.00043): every update trains the model cut by another policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from ..data import ImageSet
from ..policy import Space
from ..shape import ViTShape
from ..sharing import resize, share, unshare
from ..training import TrainConfig, fit
from . import stages
from .base import Task
from .closed_form import Sorted
from .judging import without


def share_weights(
    task: Task,
    config: TrainConfig,
    judged: ImageSet,
    ready: Sorted,
    space: Space,
    identity: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights trained at policies drawn evenly, one for each update; and what is worth recording.

    Args:
        judged: images that training leaves out.
        ready: the model and the orders of its units.
        space: where policies are drawn.
        identity: what the outcome depends on.
    """
    metric, limit = task.budget.metric, task.budget.limit(task.shape)
    names, config = space.names, stages.seeded(config, task)

    def drawn(step: int) -> ViTShape:
        values = np.random.default_rng((config.seed, step)).random(len(names))
        return space.on_budget(dict(zip(names, values.tolist(), strict=True)), metric, limit)

    cuts_tokens = "tokens" in space.dimensions
    places = [block - 1 for block in space.token_blocks] if cuts_tokens else []
    shared = share(ready.model, space.dense, ready.orders, places)
    found = fit(
        shared,
        config,
        without(stages.images(task), judged),
        teacher=task.taught_by,
        folder=stages.folder(task, stages.SHARING),
        resume=task.resume,
        before_update=lambda one, step: resize(one, drawn(step), ready.orders),
        identity=identity,
        on_event=stages.told(task, "weight sharing"),
        device=task.device,
    )
    return unshare(shared, ready.model), {
        "losses": found.losses,
        "images_per_s": found.images_per_s,
    }
