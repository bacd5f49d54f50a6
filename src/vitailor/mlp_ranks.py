"""Ranks of the MLP's two maps, as far as they are chosen without looking at the weights.

A map is factored only where that saves a good share of its cost: two layers take a time of their own, and the
largest ranks lose much for little.
"""

from __future__ import annotations

from math import floor
from typing import Literal

from .shape import BlockShape, ViTShape, revise

Map = Literal["fc1", "fc2"]
#: The maps, by their names among `shape.Ranks`.
MAPS: tuple[Map, ...] = ("fc1", "fc2")
#: The least share of its cost that is worth a second layer, if the rank is more than one step.
SAVED = 0.2


def set_ranks(b: BlockShape, **ranks: int | None) -> BlockShape:
    """The block with maps at other ranks; None for one layer."""
    return b.model_copy(update={"ranks": revise(b.ranks, **ranks)})


def lowered(
    shape: ViTShape, b: BlockShape, ratio: float, step: int, nearest: bool = False
) -> BlockShape:
    """The block with its maps at ranks that cost so much less than one layer.

    The cost never rises with the ratio, nor when hidden units go: a map becomes one layer again only where that
    costs no more.

    Args:
        ratio: what goes of the cost; below `SAVED` they stay one layer.
        step: ranks are multiples of it.
        nearest: round to the nearest multiple instead of down.
    """
    ranks: dict[str, int | None] = {}
    for name in MAPS:
        even = _break_even(shape, b, name)
        wanted = floor(even * (1 - ratio) / step + (0.5 if nearest else 0)) * step
        rank = max(step, min(wanted, _most(even, step)))
        ranks[name] = rank if ratio >= SAVED and rank < even else None
    return set_ranks(b, **ranks)


def raised(shape: ViTShape, b: BlockShape, name: Map, step: int) -> BlockShape | None:
    """The block with one step more of rank for a factored map, or with one layer where two would hardly save any
    more; None where it is one."""
    rank = getattr(b.ranks, name)
    if rank is None:
        return None
    more = rank + step
    return set_ranks(
        b, **{name: more if more <= _most(_break_even(shape, b, name), step) else None}
    )


def _break_even(shape: ViTShape, b: BlockShape, name: Map) -> float:
    """The rank at which two factors of a block's map cost as much as one layer."""
    fan_in, fan_out = shape.linears_of(b)[name]
    return fan_in * fan_out / (fan_in + fan_out)


def _most(even: float, step: int) -> int:
    """The largest rank that saves enough."""
    return floor((1 - SAVED) * even / step) * step
