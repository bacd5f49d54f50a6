"""How much to cut where, under one budget over every dimension: uniform, or by marginal cost.

An allocation is a `ViTShape`: the sizes to cut to. Which units stay is the criterion's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .budget import cost
from .errors import BudgetError
from .shape import BlockShape, ViTShape
from .simulate import Simulator, Trial

Dimension = Literal["tokens", "qk", "v", "neurons", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("tokens", "qk", "v", "neurons", "heads")
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Steps:
    """Smallest change of each dimension: sizes stay multiples of it, so that kernels stay fast."""

    tokens: int = 1
    qk: int = 8
    v: int = 8
    neurons: int = 16
    heads: int = 1

    @classmethod
    def for_shape(cls, shape: ViTShape) -> Steps:
        """Steps that suit the model: multiples of 8 for head dims and 16 for neurons, finer if tiny."""
        head = min(b.qk_dim for b in shape.blocks)
        mlp = min(b.mlp_dim for b in shape.blocks)
        dim = 8 if head >= 32 else max(1, head // 8)
        return cls(qk=dim, v=dim, neurons=16 if mlp >= 256 else max(1, mlp // 16))


FIELDS: dict[Dimension, str] = {
    "tokens": "num_tokens_out",
    "qk": "qk_dim",
    "v": "v_dim",
    "neurons": "mlp_dim",
    "heads": "num_heads",
}


def with_size(shape: ViTShape, index: int, dimension: Dimension, size: int) -> ViTShape:
    """The shape with one dimension of one block changed.

    Tokens removed in a block are gone in all later ones too; later blocks go on removing as many.
    """
    blocks = list(shape.blocks)
    if dimension != "tokens":
        blocks[index] = blocks[index].model_copy(update={FIELDS[dimension]: size})
        return shape.model_copy(update={"blocks": tuple(blocks)})
    floor = shape.num_prefix_tokens + 1
    arriving = blocks[index].num_tokens_in
    for i in range(index, len(blocks)):
        block = blocks[i]
        leaving = size if i == index else arriving - (block.num_tokens_in - block.num_tokens_out)
        leaving = max(floor, min(leaving, arriving))
        blocks[i] = block.model_copy(update={"num_tokens_in": arriving, "num_tokens_out": leaving})
        arriving = leaving
    return shape.model_copy(update={"blocks": tuple(blocks)})


def smallest(
    block: BlockShape, dimension: Dimension, steps: Steps, shape: ViTShape, dense: BlockShape
) -> int:
    """The least size a dimension may fall to."""
    if dimension == "tokens":
        return shape.num_prefix_tokens + 1
    if dimension == "heads":
        return 1
    step: int = getattr(steps, dimension)
    return min(step, getattr(dense, FIELDS[dimension]))


def allocate_uniform(
    dense: ViTShape, metric: str, limit: int, dimensions: Sequence[Dimension], steps: Steps
) -> ViTShape:
    """Every block and dimension cut in the same proportion; tokens by the same number in each block.

    Raises:
        BudgetError: when the smallest such model is still too large.
    """

    def at(cut: float) -> ViTShape:
        shape = dense
        patches = dense.num_tokens - dense.num_prefix_tokens
        for i in range(dense.depth):
            for dimension in dimensions:
                if dimension == "tokens":
                    per_block = cut * (patches - 1) / dense.depth
                    gone = round(per_block * (i + 1)) - round(per_block * i)
                    size = shape.blocks[i].num_tokens_in - gone
                else:
                    size = _rounded(dense.blocks[i], dimension, 1 - cut, steps)
                shape = with_size(shape, i, dimension, size)
        return shape

    low, high = 0.0, 1.0
    if cost(at(high), metric) > limit:
        raise _unreachable(metric, limit, cost(at(high), metric))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle), metric) <= limit else (middle, high)
    return fill(at(high), dense, metric, limit, dimensions, steps)


def _rounded(block: BlockShape, dimension: Dimension, keep: float, steps: Steps) -> int:
    full: int = getattr(block, FIELDS[dimension])
    step: int = getattr(steps, dimension)
    return min(full, max(step, round(full * keep / step) * step))


def fill(
    shape: ViTShape,
    dense: ViTShape,
    metric: str,
    limit: int,
    dimensions: Sequence[Dimension],
    steps: Steps,
) -> ViTShape:
    """Give back single units until not one more fits, the dearest that fits first."""
    while True:
        options = [
            grown
            for i in range(shape.depth)
            for dimension in dimensions
            if (grown := _grown(shape, dense, i, dimension, steps)) is not None
        ]
        fitting = [s for s in options if cost(shape, metric) < cost(s, metric) <= limit]
        if not fitting:
            return shape
        shape = max(fitting, key=lambda s: cost(s, metric))


def _grown(
    shape: ViTShape, dense: ViTShape, i: int, dimension: Dimension, steps: Steps
) -> ViTShape | None:
    """One unit more, where the block has been cut."""
    block = shape.blocks[i]
    size: int = getattr(block, FIELDS[dimension])
    full = block.num_tokens_in if dimension == "tokens" else getattr(dense.blocks[i], FIELDS[dimension])
    if size >= full:
        return None
    return with_size(shape, i, dimension, min(full, size + getattr(steps, dimension)))


def allocate_marginal(
    simulator: Simulator,
    metric: str,
    limit: int,
    dimensions: Sequence[Dimension],
    steps: Steps,
    *,
    resolution: float = 0.01,
    progress: Progress | None = None,
) -> ViTShape:
    """Greedy descent: again and again the cut that harms the outputs least for what it saves.

    A cut shrinks one dimension of one block by about `resolution` of the dense cost (at least one
    step). Its price is the rise of the harm it causes, given all cuts made before, over the cost it
    saves. Prices are kept in a queue and measured anew only when they come to the top, since they
    mostly rise as cuts accumulate (lazy greedy, Minoux 1978). All dimensions of all blocks compete.

    Args:
        simulator: at the dense sizes; left at the sizes found.
        metric, limit: "macs" or "params", and how much is allowed.

    Raises:
        BudgetError: when no combination of cuts meets the limit.
    """
    for _ in marginal_path(
        simulator, metric, limit, dimensions, steps, resolution=resolution, progress=progress
    ):
        pass
    return fill(simulator.shape, simulator.dense, metric, limit, dimensions, steps)


def marginal_path(
    simulator: Simulator,
    metric: str,
    limit: int,
    dimensions: Sequence[Dimension],
    steps: Steps,
    *,
    resolution: float,
    progress: Progress | None,
) -> Iterator[Trial]:
    """The cuts of `allocate_marginal`, one after the other, each already accepted."""
    dense = simulator.dense
    start, quantum = cost(dense, metric), resolution * cost(dense, metric)
    queue: list[tuple[float, int, int, Dimension]] = []
    round_of: dict[tuple[int, Dimension], int] = {}

    def price(i: int, dimension: Dimension) -> tuple[float, Trial] | None:
        cut = _cut(simulator.shape, dense, i, dimension, steps, metric, quantum)
        if cut is None:
            return None
        trial = simulator.trial(cut, i)
        saved = cost(simulator.shape, metric) - cost(cut, metric)
        return (trial.harm - simulator.harm) / saved * quantum, trial

    accepted = 0
    candidates = [(i, d) for i in range(dense.depth) for d in dimensions]
    for i, dimension in candidates:
        heapq.heappush(queue, (float("-inf"), len(round_of), i, dimension))
        round_of[i, dimension] = -1
    while cost(simulator.shape, metric) > limit:
        if not queue:
            raise _unreachable(metric, limit, cost(simulator.shape, metric))
        _, tie, i, dimension = heapq.heappop(queue)
        found = price(i, dimension)
        if found is None:
            continue
        if queue and found[0] > queue[0][0]:
            heapq.heappush(queue, (found[0], tie, i, dimension))
            continue
        simulator.accept(found[1])
        accepted += 1
        heapq.heappush(queue, (found[0], tie, i, dimension))
        if progress is not None:
            progress(min(1.0, (start - cost(simulator.shape, metric)) / max(1, start - limit)))
        yield found[1]


def _cut(
    shape: ViTShape,
    dense: ViTShape,
    i: int,
    dimension: Dimension,
    steps: Steps,
    metric: str,
    quantum: float,
) -> ViTShape | None:
    """The smallest cut of a dimension that saves `quantum`, or the largest possible; None if none."""
    block = shape.blocks[i]
    size: int = getattr(block, FIELDS[dimension])
    step: int = getattr(steps, dimension)
    floor = smallest(block, dimension, steps, shape, dense.blocks[i])
    best: ViTShape | None = None
    while size > floor:
        size = max(floor, (size - 1) // step * step)
        candidate = with_size(shape, i, dimension, size)
        saved = cost(shape, metric) - cost(candidate, metric)
        if saved > 0:
            best = candidate
        if saved >= quantum:
            break
    return best


def _unreachable(metric: str, limit: int, least: int) -> BudgetError:
    return BudgetError(
        f"No plan meets {limit:,} {metric}: the smallest model these dimensions allow has {least:,}.",
        "Ask for more, or allow more dimensions to be cut.",
    )
