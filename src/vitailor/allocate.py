"""How much to cut where, under one budget over every dimension: uniform, or by marginal cost.

An allocation is a `ViTShape`: the sizes to cut to. Which units stay is the criterion's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .budget import cost
from .errors import BudgetError
from .harm import HarmModel, Known, Tilt, total
from .mlp_ranks import MAPS, Map, raised
from .shape import BlockShape, ViTShape, resized
from .simulate import Simulator, Trial
from .sizes import FIELDS, Dimension, SearchDimension, Steps, grid, with_block, with_size

Floats = NDArray[np.float64]
#: What is given back one by one: units of a dimension, or steps of a map's rank.
Unit = Dimension | Map


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
                    # Never more than a model that merges already leaves.
                    left = shape.blocks[i].num_tokens_in - gone
                    size = min(left, dense.blocks[i].num_tokens_out)
                else:
                    size = rounded(dense.blocks[i], dimension, 1 - cut, steps)
                shape = with_size(shape, i, dimension, size)
        return shape

    shape = _largest_within(at, metric, limit)
    return fill(shape, dense, metric, limit, dimensions, steps)


def rounded(block: BlockShape, dimension: Dimension, keep: float, steps: Steps) -> int:
    """The size nearest to a share of a block's that is a multiple of its step."""
    full: int = getattr(block, FIELDS[dimension])
    step: int = getattr(steps, dimension)
    return min(full, max(step, round(full * keep / step) * step))


def _largest_within(at: Callable[[float], ViTShape], metric: str, limit: int) -> ViTShape:
    """The shape of the least cut in [0, 1] whose cost is within the limit, by bisection."""
    low, high = 0.0, 1.0
    _require(at(high), metric, limit)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle), metric) <= limit else (middle, high)
    return at(high)


def require_reachable(
    dense: ViTShape, metric: str, limit: int, dimensions: Sequence[Dimension], steps: Steps
) -> None:
    """Tell whether `allocate_marginal` can meet a budget, before any harm is measured.

    Raises:
        BudgetError: when the smallest sizes still cost too much.
    """
    least = _Solver(HarmModel(dense, {}), metric, dimensions, steps).solve(np.inf)
    _require(least, metric, limit)


def _require(least: ViTShape, metric: str, limit: int) -> None:
    if cost(least, metric) > limit:
        raise BudgetError(
            f"No plan meets {limit:,} {metric}: the smallest model these dimensions allow has "
            f"{cost(least, metric):,}.",
            "Ask for more, or allow more dimensions to be cut.",
        )


def fill(
    shape: ViTShape,
    dense: ViTShape,
    metric: str,
    limit: int,
    dimensions: Sequence[SearchDimension],
    steps: Steps,
    harm: HarmModel | None = None,
) -> ViTShape:
    """Give back single units until not one more fits: those that undo most harm for their cost, or,
    without a harm model, the dearest."""
    units: list[Unit] = []
    for dimension in dimensions:
        units += MAPS if dimension == "ranks" else (dimension,)
    harms: Known = {}
    # A candidate stays what it is until its block changes, or the tokens of any.
    known: dict[tuple[int, Unit], tuple[int, float]] = {}
    while True:
        present = cost(shape, metric)
        best: tuple[float, int, Unit] | None = None
        for i in range(shape.depth):
            for unit in units:
                if (i, unit) not in known or unit == "tokens":
                    known[i, unit] = _gain(shape, dense, metric, i, unit, steps, harm, harms)
                added, worth = known[i, unit]
                if 0 < added <= limit - present and (best is None or worth > best[0]):
                    best = worth, i, unit
        if best is None:
            return shape
        _, changed, unit = best
        grown = _grown(shape, dense, changed, unit, steps)
        assert grown is not None  # it was worth something
        shape = grown
        for key in [key for key in known if unit == "tokens" or key[0] == changed]:
            del known[key]


def _gain(
    shape: ViTShape,
    dense: ViTShape,
    metric: str,
    i: int,
    dimension: Unit,
    steps: Steps,
    harm: HarmModel | None,
    harms: Known,
) -> tuple[int, float]:
    """What one unit more costs, and what it is worth; nothing where the block is whole."""
    grown = _grown(shape, dense, i, dimension, steps)
    if grown is None:
        return 0, 0.0
    added = cost(grown, metric) - cost(shape, metric)
    if harm is None or added <= 0:
        return added, float(added)
    return added, (total(harm, shape, harms) - total(harm, grown, harms)) / added


def _grown(
    shape: ViTShape, dense: ViTShape, i: int, dimension: Unit, steps: Steps
) -> ViTShape | None:
    """One unit more, where the block has been cut."""
    block = shape.blocks[i]
    if dimension == "fc1" or dimension == "fc2":
        higher = raised(shape, block, dimension, steps.ranks)
        return None if higher is None else with_block(shape, i, higher)
    size: int = getattr(block, FIELDS[dimension])
    full: int = getattr(dense.blocks[i], FIELDS[dimension])
    if dimension == "tokens":
        full = min(full, block.num_tokens_in)
    if size >= full:
        return None
    grown = with_size(shape, i, dimension, min(full, size + getattr(steps, dimension)), dense)
    for later, block in enumerate(dense.blocks):
        # A model that merges already never gets tokens back.
        if grown.blocks[later].num_tokens_out > block.num_tokens_out:
            grown = with_size(grown, later, "tokens", block.num_tokens_out)
    return grown


def allocate_marginal(
    harm: HarmModel, metric: str, limit: int, dimensions: Sequence[Dimension], steps: Steps
) -> ViTShape:
    """The sizes of least modelled harm within the budget, over all dimensions and blocks at once.

    At a price per unit of cost, the best sizes minimise harm + price * cost: exactly, by dynamic
    programming over blocks with the token count as state, since given its token counts a block's other
    sizes are its own affair. The price is raised until the budget is met; every cut then pays the same
    marginal harm per unit saved. A higher price never gives a costlier model, so cost is monotone in
    the budget. What rounding left is given back unit by unit.

    Args:
        harm: curves of every dimension of every block.
        metric, limit: "macs" or "params", and how much is allowed.

    Raises:
        BudgetError: when the smallest sizes still cost too much.
    """
    solver = _Solver(harm, metric, dimensions, steps)

    def at(cut: float) -> ViTShape:
        # Maps [0, 1] to prices from 0 to infinity, in harm per dense cost, evenly on a log scale
        # around 1.
        return solver.solve(np.inf if cut >= 1.0 else (cut / (1 - cut)) ** 4)

    shape = _largest_within(at, metric, limit)
    return fill(shape, harm.dense, metric, limit, dimensions, steps, harm)


#: First step of the search in each number of a `Tilt`, and how often the steps shrink.
STEPS = (0.6, 0.8, 0.8, 0.25)
ROUNDS = 3


def allocate_tuned(
    harm: HarmModel,
    simulator: Simulator,
    metric: str,
    limit: int,
    dimensions: Sequence[Dimension],
    steps: Steps,
) -> ViTShape:
    """`allocate_marginal`, with the harm model bent until its choice harms least when really measured.

    Curves measured one cut at a time miss how cuts interact. A coordinate search over the four numbers
    of a `Tilt` tries the plans that bent models lead to, each exactly on the budget, and keeps the one
    of least measured harm. Freer corrections, a weight for each block, say, were measured and overfit
    the images.

    Args:
        simulator: on the images to measure on.
    """
    tried: set[tuple[BlockShape, ...]] = set()

    def attempt(tilt: Tilt, rival: Trial | None) -> Trial | None:
        """What a bent model leads to, unless that has been tried."""
        shape = allocate_marginal(harm.tilted(tilt), metric, limit, dimensions, steps)
        if shape.blocks in tried:
            return None
        tried.add(shape.blocks)
        return simulator.trial(shape, 0, rival)

    tilt = Tilt()
    best = attempt(tilt, None)
    assert best is not None  # nothing was tried before
    for shrink in range(ROUNDS):
        for axis, step in enumerate(STEPS):
            for change in (step, -step):
                values = list(tilt)
                values[axis] += change * 0.6**shrink
                found = attempt(Tilt(*values), best)
                if found is not None and found.harm < best.harm:
                    best, tilt = found, Tilt(*values)
                    break
    return best.shape


#: Cost of a half block: fixed, for each token, for each pair of tokens.
Terms = tuple[float, float, float]


@dataclass(frozen=True)
class _Options:
    """Sizes that a half block may take, each with its harm and the terms of its cost."""

    blocks: list[BlockShape]
    harm: Floats
    fixed: Floats
    per_token: Floats
    per_pair: Floats


class _Solver:
    """Dynamic programming over blocks; built once, solved at many prices."""

    def __init__(
        self, harm: HarmModel, metric: str, dimensions: Sequence[Dimension], steps: Steps
    ) -> None:
        self.harm, self.metric, self.dense = harm, metric, harm.dense
        full, floor = self.dense.num_tokens, self.dense.num_prefix_tokens + 1
        # What the model itself leaves in each block; more than one count if it merges already.
        left = [b.num_tokens_out for b in self.dense.blocks]
        counts = {full, *left}
        if "tokens" in dimensions:
            sizes = grid(self.dense, 0, "tokens", steps)
            counts |= {floor, *sizes[:: -max(1, len(sizes) // 64)]}
        n = self.counts = np.array(sorted(counts))
        merges = n[:, None] >= n[None, :]
        self.allowed = [
            merges & ((n <= out) if "tokens" in dimensions else (n == out)) for out in left
        ]
        self.attn = [self._attention(i, dimensions, steps) for i in range(self.dense.depth)]
        self.mlp = [self._mlp(i, dimensions, steps) for i in range(self.dense.depth)]
        self.tokens = [harm.table(i, "tokens", self.counts) for i in range(self.dense.depth)]
        # At the dense width, if heads or QK dims are cut a little too much; whole shapes cost exactly.
        widest = max(b.num_heads * b.qk_dim for b in self.dense.blocks)
        whole = n.tolist()  # numpy's integers must not get into the costs of shapes
        table = [
            [self.dense.merging_macs(a, b, widest) if b < a else 0 for b in whole] for a in whole
        ]
        unit = float(metric == "macs") / cost(self.dense, metric)
        self.merging = np.array(table, dtype=float) * unit

    def solve(self, price: float) -> ViTShape:
        """The shape that minimises harm + price * cost / dense cost."""
        n = self.counts
        weight, price = (0.0, 1.0) if np.isinf(price) else (1.0, price)
        value = np.where(n == self.dense.num_tokens, 0.0, np.inf)
        history: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        for i in range(self.dense.depth):
            attn, attn_choice = _best(self.attn[i], n, weight, price)
            mlp, mlp_choice = _best(self.mlp[i], n, weight, price)
            step = price * self.merging + weight * (
                self.tokens[i][None, :] - self.tokens[i][:, None]
            )
            through = (value + attn)[:, None] + step + mlp[None, :]
            through = np.where(self.allowed[i], through, np.inf)
            came_from = through.argmin(0)
            value = through[came_from, np.arange(len(n))]
            history.append((came_from, attn_choice, mlp_choice))
        state = int(value.argmin())
        blocks: list[BlockShape] = []
        for i in reversed(range(self.dense.depth)):
            came_from, attn_choice, mlp_choice = history[i]
            before = int(came_from[state])
            chosen = self.attn[i].blocks[attn_choice[before]]
            sizes = {"mlp_dim": self.mlp[i].blocks[mlp_choice[state]].mlp_dim}
            sizes |= {"num_tokens_in": int(n[before]), "num_tokens_out": int(n[state])}
            blocks.append(resized(self.dense.embed_dim, chosen, sizes))
            state = before
        return self.dense.model_copy(update={"blocks": tuple(reversed(blocks))})

    def _attention(self, i: int, dimensions: Sequence[Dimension], steps: Steps) -> _Options:
        block = self.dense.blocks[i]
        inside: tuple[Dimension, ...] = ("heads", "qk", "v")
        axes: list[list[int]] = []
        for dimension in inside:
            full = getattr(block, FIELDS[dimension])
            axes.append(
                grid(self.dense, i, dimension, steps) if dimension in dimensions else [full]
            )
        tables = [self.harm.table(i, d, np.array(a)) for d, a in zip(inside, axes, strict=True)]
        blocks, harms = [], []
        for a, heads in enumerate(axes[0]):
            for b, qk in enumerate(axes[1]):
                for c, v in enumerate(axes[2]):
                    update = {"num_heads": heads, "qk_dim": qk, "v_dim": v}
                    blocks.append(resized(self.dense.embed_dim, block, update))
                    harms.append(tables[0][a] + tables[1][b] + tables[2][c])
        return self._options(blocks, np.array(harms), self._attention_terms)

    def _mlp(self, i: int, dimensions: Sequence[Dimension], steps: Steps) -> _Options:
        block = self.dense.blocks[i]
        sizes = (
            grid(self.dense, i, "neurons", steps) if "neurons" in dimensions else [block.mlp_dim]
        )
        blocks = [resized(self.dense.embed_dim, block, {"mlp_dim": size}) for size in sizes]
        harms = self.harm.table(i, "neurons", np.array(sizes))
        return self._options(blocks, harms, self._mlp_terms)

    def _options(
        self, blocks: list[BlockShape], harm: Floats, terms: Callable[[BlockShape], Terms]
    ) -> _Options:
        dense_cost = cost(self.dense, self.metric)
        fixed, per_token, per_pair = np.array([terms(b) for b in blocks]).T / dense_cost
        return _Options(blocks, harm, fixed, per_token, per_pair)

    def _attention_terms(self, block: BlockShape) -> Terms:
        if self.metric == "params":
            return float(self.dense.attention_params(block)), 0.0, 0.0
        per_token, per_pair = self.dense.attention_macs(block)
        return 0.0, float(per_token), float(per_pair)

    def _mlp_terms(self, block: BlockShape) -> Terms:
        if self.metric == "params":
            return float(self.dense.mlp_params(block)), 0.0, 0.0
        return 0.0, float(self.dense.mlp_macs(block)), 0.0


def _best(
    options: _Options, n: NDArray[np.int64], weight: float, price: float
) -> tuple[Floats, NDArray[np.int64]]:
    """Least weight * harm + price * cost for each token count, and the option that gives it."""
    tokens = n[:, None].astype(float)
    spent = options.fixed + options.per_token * tokens + options.per_pair * tokens**2
    value = weight * options.harm + price * spent
    choice = value.argmin(1)
    return value[np.arange(len(n)), choice], choice
