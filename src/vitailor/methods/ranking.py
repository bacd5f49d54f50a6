"""Units in the order in which a search cuts them: by dependence on the predictions, or by error of the output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import dependence
from ..bases import rotate
from ..calibrate import dense_sweep
from ..criteria import Order, with_match_features
from ..dependence import Bandwidths, Estimator
from ..shape import BlockShape
from .base import Task
from .closed_form import ClosedForm, Sorted

#: Dependence is estimated within batches of so many images, as published.
BATCH = 128


def by_output_error(task: Task, ridge: float) -> Sorted:
    """The model, in bases in which dims of heads can be cut, with moments and orders of its units.

    Args:
        ridge: of compensation.
    """
    return ClosedForm(ridge=ridge).sort(task)


def unranked(task: Task, sweeps: bool) -> Sorted:
    """The model with heads and neurons in their old order.

    Args:
        sweeps: moments are needed, or dims of heads are cut; these are sorted by their bases.
    """
    orders = [_as_they_are(block, task.device) for block in task.shape.blocks]
    if not sweeps:
        return Sorted(task.model, [], orders)
    model, moments = rotate(task.model, dense_sweep(task.model, task.batches()))
    orders = [with_match_features(o, m) for o, m in zip(orders, moments, strict=True)]
    return Sorted(model, moments, orders)


def by_dependence(
    found: Sorted,
    task: Task,
    *,
    units: bool,
    places: bool,
    bandwidths: Bandwidths,
    estimator: Estimator,
    redundancy: float,
    relevance: float,
) -> Sorted:
    """The same, with orders by dependence; query/key and value dims keep theirs.

    Args:
        units: whether heads and neurons are ordered.
        places: whether the places of tokens get weights.
        bandwidths, estimator, redundancy, relevance: see `dependence`.
    """
    assert task.data is not None
    scores = dependence.score(
        task.model,
        task.batches(size=batch_size(len(task.data))),
        bandwidths=bandwidths,
        estimator=estimator,
        redundancy_weight=redundancy,
        tokens=places,
    )
    orders = []
    for order, own in zip(found.orders, scores, strict=True):
        new = replace(order, token_weights=own.tokens)
        if units:
            new = replace(
                new,
                heads=own.heads.argsort(descending=True, stable=True),
                neurons=own.neurons(relevance).argsort(descending=True, stable=True),
            )
        orders.append(new)
    return replace(found, orders=orders)


def batch_size(images: int) -> int:
    """About `BATCH`, such that the last batch, too, has at least half as many: a small one could not tell."""
    least = -(-images // max(1, images // BATCH))
    return next(s for s in range(least, images + 1) if not images % s or images % s >= s / 2)


def _as_they_are(block: BlockShape, device: torch.device) -> Order:
    """Units in their old order."""

    def first(count: int) -> Tensor:
        return torch.arange(count, device=device)

    heads = block.num_heads
    return Order(
        heads=first(heads),
        qk_dims=first(block.qk_dim).expand(heads, -1),
        v_dims=first(block.v_dim).expand(heads, -1),
        neurons=first(block.mlp_dim),
    )
