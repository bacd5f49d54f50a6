"""Scores to sizes by one threshold: what ranks lowest among all that compete goes, up to a rate or a budget.

The pruning step of Vision Transformer Pruning (arXiv 2104.08500), for gates or any other scores: a rate
sets how many units fall below the threshold, over the whole model, for each kind of unit, or in each layer.

Every head of a block keeps equally many dims, each its own best; how many follows from the block's total,
so no dim moves to another head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .budget import cost
from .criteria import Importance
from .errors import BudgetError, UsageError
from .shape import BlockShape, ViTShape, resized

Scope = Literal["global", "kind", "layer"]
#: Kinds of units: the scores they are ranked by, and the sizes of a block that they count. "dims" are those
#: of Q, K and V under one vector of scores.
Kind = Literal["attn_features", "v", "dims", "mlp_features", "neurons"]
SCORES: dict[Kind, str] = {
    "attn_features": "attn_features",
    "v": "v_dims",
    "dims": "v_dims",
    "mlp_features": "mlp_features",
    "neurons": "neurons",
}
SIZES: dict[Kind, tuple[str, ...]] = {
    "attn_features": ("attn_features",),
    "v": ("v_dim",),
    "dims": ("qk_dim", "v_dim"),
    "mlp_features": ("mlp_features",),
    "neurons": ("mlp_dim",),
}
#: Kinds that the gates of each placement rank (`gates.PLACES`).
GATED: dict[str, tuple[Kind, ...]] = {
    "inputs": ("attn_features", "v", "mlp_features", "neurons"),
    "outputs": ("dims", "neurons"),
    "hidden": ("neurons",),
}


@dataclass(frozen=True)
class Layer:
    """One kind of unit in one block.

    Attributes:
        ranks: of its units, best first, each its place among all that compete with it, from 0 (worst) to 1.
        groups: how many equal parts the units are in: heads for dims, else 1.
        least: how many units stay whatever their scores.
    """

    block: int
    kind: Kind
    ranks: tuple[float, ...]
    groups: int
    least: int

    def kept(self, rate: float) -> int:
        """Units for each group that stay when a share `rate` of all that compete goes."""
        above = sum(rank >= rate for rank in self.ranks)
        return max(1, -(-self.least // self.groups), round(above / self.groups))


def rank(
    scores: Sequence[Importance],
    kinds: Sequence[Kind],
    scope: Scope = "global",
    floor: float = 0.05,
) -> list[Layer]:
    """Rank all units against those they compete with.

    Args:
        scores: of each block.
        kinds: which units compete.
        scope: against what a unit is ranked: "global" all units of all kinds, "kind" those of its kind in
            all blocks, "layer" those of its kind in its block.
        floor: share of each layer's units that stay whatever their scores: a global threshold may else
            empty a layer.

    Raises:
        UsageError: when a kind has no scores.
    """
    found: list[tuple[int, Kind, torch.Tensor]] = []
    for i, block in enumerate(scores):
        for kind in kinds:
            values = getattr(block, SCORES[kind])
            if values is None:
                raise UsageError(
                    f"blocks.{i} has no scores for '{kind}'.", "Use a criterion that scores it."
                )
            found.append((i, kind, values))
    rivals: dict[object, list[int]] = {}
    for position, (i, kind, _) in enumerate(found):
        key: object = {"global": None, "kind": kind, "layer": (i, kind)}[scope]
        rivals.setdefault(key, []).append(position)
    layers: dict[int, Layer] = {}
    for positions in rivals.values():
        flat = torch.cat([found[p][2].flatten().double() for p in positions])
        place = flat.argsort(stable=True).argsort(stable=True).double() / len(flat)
        sizes = [found[p][2].numel() for p in positions]
        for p, ranks in zip(positions, place.split(sizes), strict=True):
            i, kind, values = found[p]
            best_first = tuple(ranks.sort(descending=True).values.tolist())
            groups = values.shape[0] if values.dim() == 2 else 1
            layers[p] = Layer(i, kind, best_first, groups, round(floor * values.numel()))
    return [layers[p] for p in sorted(layers)]


def at_rate(dense: ViTShape, layers: Sequence[Layer], rate: float) -> ViTShape:
    """The sizes left when a share `rate` of all that compete goes."""
    return _with(dense, [(layer, layer.kept(rate)) for layer in layers])


def within_budget(dense: ViTShape, layers: Sequence[Layer], metric: str, limit: int) -> ViTShape:
    """The sizes of the lowest threshold that meets a budget; then single units are given back, the best
    first, until none fits.

    Args:
        metric, limit: "macs" or "params", and how much is allowed.

    Raises:
        BudgetError: when even the floors cost too much.
    """
    least = at_rate(dense, layers, 1.1)
    if cost(least, metric) > limit:
        raise BudgetError(
            f"No threshold meets {limit:,} {metric}: with every layer at its floor the model has "
            f"{cost(least, metric):,}.",
            "Ask for more, lower the floor, or cut other dimensions too.",
        )
    rates = sorted({0.0, 1.1, *(r for layer in layers for r in layer.ranks)})
    low, high = 0, len(rates) - 1
    while low < high:
        middle = (low + high) // 2
        fits = cost(at_rate(dense, layers, rates[middle]), metric) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    kept = [layer.kept(rates[low]) for layer in layers]

    def build(counts: list[int]) -> ViTShape:
        return _with(dense, list(zip(layers, counts, strict=True)))

    return build(_given_back(layers, kept, lambda counts: cost(build(counts), metric) <= limit))


def kept(shape: ViTShape, layer: Layer) -> int:
    """How many of a layer's units a model of this shape still has."""
    size: int | None = getattr(shape.blocks[layer.block], SIZES[layer.kind][-1])
    return len(layer.ranks) if size is None else size * layer.groups


def _given_back(
    layers: Sequence[Layer], kept: list[int], fits: Callable[[list[int]], bool]
) -> list[int]:
    """Counts with one unit after the other given back, best rank first, while that fits."""
    open_ = {i for i, layer in enumerate(layers) if kept[i] < len(layer.ranks) // layer.groups}
    while open_:
        best = max(open_, key=lambda i: layers[i].ranks[kept[i] * layers[i].groups])
        more = [*kept[:best], kept[best] + 1, *kept[best + 1 :]]
        if fits(more):
            kept = more
        if not fits(more) or kept[best] == len(layers[best].ranks) // layers[best].groups:
            open_.discard(best)
    return kept


def _with(dense: ViTShape, counts: Sequence[tuple[Layer, int]]) -> ViTShape:
    for layer, _ in counts:
        block = dense.blocks[layer.block]
        if layer.kind == "dims" and (block.qk_dim != block.v_dim or dense.qk_norm):
            raise UsageError(
                f"blocks.{layer.block}: dims of Q, K and V cannot be cut together: they differ, or Q and K "
                "are normalised.",
                "Cut value dims alone.",
            )
    changes: list[dict[str, int]] = [{} for _ in dense.blocks]
    for layer, count in counts:
        if count < len(layer.ranks) // layer.groups:
            changes[layer.block] |= dict.fromkeys(SIZES[layer.kind], count)
    blocks: list[BlockShape] = [
        resized(dense.embed_dim, block, change)
        for block, change in zip(dense.blocks, changes, strict=True)
    ]
    return dense.with_blocks(tuple(blocks))
