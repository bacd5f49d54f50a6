"""Policies of multi-dimensional compression: which share of heads, neurons and tokens goes, and where.

After "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043): a policy gives every block
a ratio of neurons and of heads, and a ratio of tokens at a few blocks. A `Space` says which ratios are free. A
search proposes directions in it, and one scale is solved for, so that every proposal lands on the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import Annotated, Self

from pydantic import Field, model_validator

from .allocate import fill
from .budget import cost
from .errors import BudgetError, UsageError
from .mlp_ranks import MAPS, lowered, set_ranks
from .shape import DENSE, Facts, ViTShape, resized
from .sizes import FIELDS, Dimension, SearchDimension, Steps, with_block, with_size

Ratio = Annotated[float, Field(ge=0, lt=1)]
Ratios = tuple[Ratio, ...]
#: Blocks after whose attention tokens go, counted from 1, as published for twelve.
TOKEN_BLOCKS = (4, 7, 10)
#: Ratios that a space knows, in the order of its parameters.
CUT: tuple[SearchDimension, ...] = ("neurons", "heads", "qk", "v", "ranks", "tokens")
#: What goes of a dimension is at least this share of its scale: a direction must lead somewhere.
LEAST = 0.01
STEPS = Steps()
#: How the rank of a projection is called among sizes.
RANK = "{}_rank"


def token_blocks(depth: int) -> tuple[int, ...]:
    """Blocks after whose attention tokens go in a model of so many: after a quarter, half, and three quarters."""
    return tuple(sorted({min(depth, round(depth * q / 4) + 1) for q in (1, 2, 3)}))


class Policy(Facts):
    """Share of each dimension that goes, for every block; none for a dimension that stays.

    Attributes:
        neurons, heads, qk, v: ratios of hidden units, heads, query/key and value dims.
        ranks: ratios of the rank of each of the MLP's maps at which two factors cost as much as one layer, so of its
            cost; below `mlp_ranks.SAVED` it stays one layer.
        tokens: ratio of the tokens at hand, prefix included, that go after a block's attention.
    """

    neurons: Ratios | None = None
    heads: Ratios | None = None
    qk: Ratios | None = None
    v: Ratios | None = None
    ranks: Ratios | None = None
    tokens: Ratios | None = None

    @model_validator(mode="after")
    def _same_depth(self) -> Self:
        depths = {len(r) for d in CUT if (r := getattr(self, d)) is not None}
        if len(depths) > 1:
            raise ValueError(f"ratios are for different numbers of blocks: {sorted(depths)}")
        return self

    def apply(
        self, dense: ViTShape, steps: Steps, *, nearest: bool = False, fused: bool = False
    ) -> ViTShape:
        """The sizes left: full * (1 - ratio), rounded down to a multiple of the step; all steps 1 as published.

        Args:
            dense: what is cut.
            nearest: round to the nearest multiple instead. Rounded down, the smallest ratio of heads takes a
                whole one, which is much where there are few.
            fused: whether the tokens that go are averaged into one more, which stays.

        Raises:
            UsageError: when the policy is for another number of blocks, or chooses ranks for a model that has some.
        """
        if self.ranks is not None and any(block.ranks != DENSE for block in dense.blocks):
            raise UsageError(
                "The model has low-rank projections already, so ranks cannot be chosen.",
                "Multiply them out first (vitailor.merge_back), or leave ranks out.",
            )
        shape = dense
        for dimension in CUT:
            ratios: Ratios | None = getattr(self, dimension)
            if ratios is None:
                continue
            if len(ratios) != dense.depth:
                raise UsageError(
                    f"The policy is for {len(ratios)} blocks, the model has {dense.depth}.",
                    "Give a ratio for each block.",
                )
            for i, ratio in enumerate(ratios):
                if dimension == "ranks":
                    lower = lowered(shape, shape.blocks[i], ratio, steps.ranks, nearest)
                    shape = with_block(shape, i, lower)
                elif ratio > 0:
                    size = _kept(shape, i, dimension, ratio, steps, nearest, fused)
                    shape = with_size(shape, i, dimension, size)
        return _fusing(shape, dense, self.tokens or ()) if fused else shape


def _fusing(shape: ViTShape, dense: ViTShape, ratios: Sequence[float]) -> ViTShape:
    """The shape with tokens fused, instead of merged, where the ratios make more of them go than the model does."""
    blocks = []
    for own, before, ratio in zip(shape.blocks, dense.blocks, ratios, strict=False):
        more = ratio > 0 and own.num_tokens_out < min(own.num_tokens_in, before.num_tokens_out)
        blocks.append(own.model_copy(update={"fuses": own.fuses or more}))
    return shape.with_blocks((*blocks, *shape.blocks[len(blocks) :]))


#: Sizes of every block by name: of a field, or "fc1_rank" and the like, None for one layer.
Sizes = dict[str, list[int | None]]


def sizes_of(shape: ViTShape, dimensions: Sequence[SearchDimension]) -> Sizes:
    """What a search over these dimensions has chosen, such that `sized` gives the shape again."""
    found: Sizes = {}
    for dimension in dimensions:
        if dimension == "ranks":
            for name in MAPS:
                found[RANK.format(name)] = [getattr(b.ranks, name) for b in shape.blocks]
        else:
            field = FIELDS[dimension]
            found[field] = [getattr(b, field) for b in shape.blocks]
    return found


def sized(
    dense: ViTShape,
    sizes: Mapping[str, Sequence[int | None]],
    fuses: Sequence[bool] | None = None,
) -> ViTShape:
    """The shape with these sizes; no block has more tokens than arrive or than it had.

    Args:
        sizes: see `Sizes`.
        fuses: of each block, whether tokens that go are fused rather than merged; None for what it did.
    """
    blocks, tokens = [], dense.num_tokens
    for i, block in enumerate(dense.blocks):
        given = {name: values[i] for name, values in sizes.items()}
        ranks = {n: given.pop(RANK.format(n)) for n in MAPS if RANK.format(n) in given}
        own = {name: size for name, size in given.items() if size is not None}
        left = min(own.get("num_tokens_out", block.num_tokens_out), tokens)
        own |= {"num_tokens_in": tokens, "num_tokens_out": left}
        fused = block.fuses if fuses is None else fuses[i]
        after = resized(dense.embed_dim, block, {**own, "fuses": fused and left < tokens})
        blocks.append(set_ranks(after, **ranks) if ranks else after)
        tokens = left
    return dense.with_blocks(tuple(blocks))


def _kept(
    shape: ViTShape,
    i: int,
    dimension: Dimension,
    ratio: float,
    steps: Steps,
    nearest: bool,
    fused: bool,
) -> int:
    block, half = shape.blocks[i], 0.5 if nearest else 0.0
    if dimension == "tokens":
        arriving = block.num_tokens_in
        left = floor(arriving * (1 - ratio) + half) + fused
        return min(block.num_tokens_out, arriving, max(shape.num_prefix_tokens + 1 + fused, left))
    full: int = getattr(block, FIELDS[dimension])
    step: int = getattr(steps, dimension)
    return min(full, max(step, floor(full * (1 - ratio) / step + half) * step))


@dataclass(frozen=True)
class Parameter:
    """One free number of a space: the ratio of a dimension in some blocks, which share it."""

    dimension: SearchDimension
    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        """E.g. "neurons 1-4", blocks counted from 1."""
        first, last = self.blocks[0] + 1, self.blocks[-1] + 1
        return f"{self.dimension} {first}" if first == last else f"{self.dimension} {first}-{last}"


@dataclass(frozen=True)
class Space:
    """The policies that a search chooses from.

    Attributes:
        dense: the model that is cut.
        dimensions: which may be cut.
        stages: so many groups of blocks share their ratios; None gives each block its own, as published.
        token_blocks: blocks, counted from 1, after whose attention tokens go.
        tokens_apart: whether each of these has a ratio of its own; as published they share one.
        most: the largest ratio.
        steps: sizes are multiples of these.
        nearest, fused: see `Policy.apply`.
    """

    dense: ViTShape
    dimensions: Sequence[SearchDimension] = ("neurons", "heads", "tokens")
    stages: int | None = 3
    token_blocks: tuple[int, ...] = TOKEN_BLOCKS
    tokens_apart: bool = False
    most: float = 0.9
    steps: Steps = STEPS
    nearest: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise UsageError("The policy space has no dimension.", "Name at least one.")
        depth = self.dense.depth
        if self.stages is not None and not 1 <= self.stages <= depth:
            raise UsageError(
                f"{self.stages} stages do not fit a model of {depth} blocks.",
                f"Choose from 1 to {depth}.",
            )
        outside = [b for b in self.token_blocks if not 1 <= b <= depth]
        if "tokens" in self.dimensions and (outside or not self.token_blocks):
            raise UsageError(
                f"Tokens cannot go in blocks {outside or 'of none'}: the model has {depth}.",
                f"Choose from 1 to {depth}.",
            )
        if "ranks" in self.dimensions and not self._lowers_ranks:
            raise UsageError(
                f"With ratios of {self.most:g} at most and ranks in steps of {self.steps.ranks}, no rank saves "
                "anything.",
                "Allow larger ratios or smaller steps, or leave ranks out.",
            )
        if not 0 < self.most < 1:
            raise UsageError(f"The largest ratio {self.most} is not between 0 and 1.", "Give 0.9.")

    @property
    def _lowers_ranks(self) -> bool:
        """Whether any of the MLP's maps is factored at the largest ratio."""
        step, near = self.steps.ranks, self.nearest
        lower = (lowered(self.dense, b, self.most, step, near) for b in self.dense.blocks)
        return any(b.ranks.fc1 or b.ranks.fc2 for b in lower)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The free numbers."""
        found: list[Parameter] = []
        for dimension in CUT:
            if dimension not in self.dimensions:
                continue
            if dimension == "tokens":
                where = tuple(sorted({block - 1 for block in self.token_blocks}))
                groups = [(i,) for i in where] if self.tokens_apart else [where]
                found += [Parameter(dimension, group) for group in groups]
            else:
                found += [Parameter(dimension, group) for group in self._groups()]
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def first(self) -> tuple[float, ...]:
        """The direction that cuts everything alike."""
        return (1.0,) * len(self.parameters)

    def _groups(self) -> list[tuple[int, ...]]:
        depth = self.dense.depth
        count = depth if self.stages is None else self.stages
        edges = [round(depth * s / count) for s in range(count + 1)]
        return [tuple(range(a, b)) for a, b in pairwise(edges)]

    def policy(self, direction: Mapping[str, float], scale: float) -> Policy:
        """Ratios scale * value, at most `most`.

        Args:
            direction: a value from 0 to 1 for the name of each parameter.
        """
        ratios: dict[str, list[float]] = {}
        for parameter in self.parameters:
            own = ratios.setdefault(parameter.dimension, [0.0] * self.dense.depth)
            value = max(LEAST, direction[parameter.name])
            for block in parameter.blocks:
                own[block] = min(self.most, scale * value)
        return Policy(**{name: tuple(values) for name, values in ratios.items()})

    def on_budget(self, direction: Mapping[str, float], metric: str, limit: int) -> ViTShape:
        """The sizes that a direction leads to within a budget; single units that still fit are given back.

        Raises:
            BudgetError: when even the largest ratios everywhere leave too much.
        """
        self.require_reachable(metric, limit)
        low, high = 0.0, self.most / LEAST  # where every ratio is the largest
        for _ in range(60):
            middle = (low + high) / 2
            fits = cost(self.shape(direction, middle), metric) <= limit
            low, high = (low, middle) if fits else (middle, high)
        shape = self.shape(direction, high)
        return fill(shape, self.dense, metric, limit, self.dimensions, self.steps)

    def shape(self, direction: Mapping[str, float], scale: float) -> ViTShape:
        """The sizes at a scale."""
        policy = self.policy(direction, scale)
        return policy.apply(self.dense, self.steps, nearest=self.nearest, fused=self.fused)

    def require_reachable(self, metric: str, limit: int) -> None:
        """Tell whether any policy of the space meets a budget.

        Raises:
            BudgetError: when none does.
        """
        least = self.shape({p.name: 1.0 for p in self.parameters}, self.most)
        if cost(least, metric) > limit:
            raise BudgetError(
                f"No policy meets {limit:,} {metric}: with the largest ratios everywhere the model has "
                f"{cost(least, metric):,}.",
                "Ask for more, or allow more dimensions or larger ratios.",
            )
