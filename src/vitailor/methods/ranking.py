"""Units in the order in which a search cuts them: by dependence on the predictions, or by error of the output."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import dependence
from ..criteria import Order
from ..dependence import Bandwidths, Estimator
from ..shape import BlockShape
from .base import Task
from .closed_form import ClosedForm, Sorted

#: Dependence is estimated within batches of so many images, as published.
BATCH = 128


def by_output_error(task: Task, ridge: float | None) -> Sorted:
    """The model, in bases in which dims of heads can be cut, with moments and orders of its units.

    Args:
        ridge: of compensation; None leaves model and orders as they are, for what needs no moments.
    """
    if ridge is not None:
        return ClosedForm(ridge=ridge).sort(task)
    return Sorted(task.model, [], [_as_they_are(block) for block in task.shape.blocks])


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
    # Batches of nearly equal size: a small last one could not tell.
    count = max(1, len(task.data) // BATCH)
    scores = dependence.score(
        task.model,
        task.batches(size=-(-len(task.data) // count)),
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


def _as_they_are(block: BlockShape) -> Order:
    """Units in their old order."""
    heads, qk, v = block.num_heads, block.qk_dim, block.v_dim
    return Order(
        heads=torch.arange(heads),
        qk_dims=torch.arange(qk).expand(heads, -1),
        v_dims=torch.arange(v).expand(heads, -1),
        neurons=torch.arange(block.mlp_dim),
    )
