"""From sizes to a plan: take the first units of each order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .criteria import Order
from .errors import PlanError
from .plan import BlockPlan, Plan
from .shape import BlockShape, Ranks, ViTShape


def plan_for(dense: ViTShape, target: ViTShape, orders: Sequence[Order]) -> Plan:
    """The plan that cuts a model of shape `dense` to `target`, keeping the best units of every order."""
    blocks = zip(dense.blocks, target.blocks, orders, strict=True)
    plans = tuple(block_plan(d, t, o) for d, t, o in blocks)
    if not target.merges_tokens:
        return Plan(blocks=plans)
    return Plan(
        blocks=plans,
        matching=target.matching,
        match_features=match_features(dense, target, orders),
        token_weights=token_weights(dense, target, orders),
    )


def match_features(
    dense: ViTShape, target: ViTShape, orders: Sequence[Order]
) -> tuple[tuple[int, ...], ...] | None:
    """Features by which each block compares tokens; None where the model has its own, or uses all."""
    count, rows = target.match_features, [order.match_features for order in orders]
    if count is None or dense.merges_tokens:
        return None
    return tuple(_best(row, count) for row in rows if row is not None)


def token_weights(
    dense: ViTShape, target: ViTShape, orders: Sequence[Order]
) -> tuple[tuple[float, ...], ...] | None:
    """Weights of the places of tokens for each block; None where the model has its own, or there are none."""
    if not target.weighs_tokens or dense.weighs_tokens:
        return None
    rows = [order.token_weights for order in orders]
    return tuple(tuple(row.double().tolist()) for row in rows if row is not None)


def block_plan(dense: BlockShape, target: BlockShape, order: Order) -> BlockPlan:
    """Plan of one block; dimensions that stay as they are remain None."""
    heads = sorted(order.heads[: target.num_heads].tolist())
    fewer = target.num_heads < dense.num_heads
    merges = target.num_tokens_out < target.num_tokens_in
    # The model's own factors are not asked for: those that still pay stay by themselves.
    ranks = {n: r for n, r in target.ranks if r is not None and r != getattr(dense.ranks, n)}
    return BlockPlan(
        heads=tuple(heads) if fewer else None,
        qk_dims=_per_head(order.qk_dims, heads, target.qk_dim, dense.qk_dim),
        v_dims=_per_head(order.v_dims, heads, target.v_dim, dense.v_dim),
        neurons=_best(order.neurons, target.mlp_dim) if target.mlp_dim < dense.mlp_dim else None,
        attn_features=_features(order.attn_features, target.attn_features, dense.attn_features),
        mlp_features=_features(order.mlp_features, target.mlp_features, dense.mlp_features),
        num_tokens_out=target.num_tokens_out if merges else None,
        fuses=target.fuses and merges,
        ranks=Ranks(**ranks),
    )


def _best(order: Tensor, size: int) -> tuple[int, ...]:
    return tuple(sorted(order[:size].tolist()))


def _features(order: Tensor | None, size: int | None, dense: int | None) -> tuple[int, ...] | None:
    if size == dense or size is None:
        return None
    if order is None:
        raise PlanError("Input features are to be cut, but the criterion does not order them.")
    return _best(order, size)


def _per_head(
    order: Tensor, heads: list[int], size: int, dense: int
) -> tuple[tuple[int, ...], ...] | None:
    if size == dense:
        return None
    return tuple(_best(order[h], size) for h in heads)
