"""Allocation: within the budget, as close to it as units allow, and where it harms least."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import block, shape
from vitailor.allocate import _Solver, allocate_marginal, allocate_tuned, allocate_uniform
from vitailor.budget import cost
from vitailor.errors import BudgetError
from vitailor.harm import HarmModel, Tilt, total
from vitailor.shape import ViTShape
from vitailor.simulate import Trial
from vitailor.sizes import DIMENSIONS, FIELDS, Dimension, Steps, grid, with_size

STEPS = Steps(tokens=1, qk=2, v=2, neurons=8, heads=1)
WIDTHS: tuple[Dimension, ...] = ("qk", "v", "neurons", "heads")
DENSE = shape(*[block(num_tokens_in=17, num_tokens_out=17, num_heads=4)] * 3, num_tokens=17)
MERGING = shape(
    block(num_tokens_in=17, num_tokens_out=12),
    block(num_tokens_in=12, num_tokens_out=12),
    block(num_tokens_in=12, num_tokens_out=9),
    num_tokens=17,
)


def harm_model(dense: ViTShape, seed: int, power: float = 2.0) -> HarmModel:
    """Curves of the form a * (share removed)^power, with random a."""
    rng = np.random.default_rng(seed)

    def curve(full: int, scale: float):
        return lambda sizes: scale * (np.maximum(full - sizes, 0) / full) ** power

    curves = {}
    for i, dimension in product(range(dense.depth), DIMENSIONS):
        full = getattr(dense.blocks[i], FIELDS[dimension])
        curves[i, dimension] = curve(full, float(rng.uniform(0.05, 2)))
    return HarmModel(dense, curves)


def smallest(kind: str, dense: ViTShape, dimensions: tuple[Dimension, ...]) -> ViTShape:
    """The least that an allocator may go down to; uniform merging leaves one token at the very end."""
    found, patches = dense, dense.num_tokens - dense.num_prefix_tokens
    for i, dimension in product(range(dense.depth), dimensions):
        size = grid(dense, i, dimension, STEPS)[0]
        if dimension == "tokens" and kind == "uniform":
            gone = [round((patches - 1) / dense.depth * j) for j in (i, i + 1)]
            size = found.blocks[i].num_tokens_in - gone[1] + gone[0]
            size = min(size, dense.blocks[i].num_tokens_out)
        found = with_size(found, i, dimension, size)
    return found


def bigger(
    found: ViTShape, dense: ViTShape, dimensions: tuple[Dimension, ...], steps: Steps = STEPS
) -> list[ViTShape]:
    """The shape with one unit given back, in every way there is."""
    grown = []
    for i, dimension in product(range(dense.depth), dimensions):
        size = getattr(found.blocks[i], FIELDS[dimension])
        full = getattr(dense.blocks[i], FIELDS[dimension])
        full = min(full, found.blocks[i].num_tokens_in) if dimension == "tokens" else full
        if size < full:
            size = min(full, size + getattr(steps, dimension))
            more = with_size(found, i, dimension, size)
            for j, before in enumerate(dense.blocks):  # never more tokens than there were
                out = min(more.blocks[j].num_tokens_out, before.num_tokens_out)
                more = with_size(more, j, "tokens", out)
            grown.append(more)
    return grown


def allocate(
    kind: str,
    dense: ViTShape,
    metric: str,
    limit: int,
    dimensions: tuple[Dimension, ...],
    seed: int,
) -> ViTShape:
    if kind == "uniform":
        return allocate_uniform(dense, metric, limit, dimensions, STEPS)
    return allocate_marginal(harm_model(dense, seed), metric, limit, dimensions, STEPS)


kinds = st.sampled_from(["uniform", "marginal"])
metrics = st.sampled_from(["macs", "params"])
chosen = st.lists(st.sampled_from(DIMENSIONS), min_size=1, unique=True).map(tuple)


@st.composite
def problems(draw: st.DrawFn):
    """Allocator, model, metric, limit, dimensions and seed that can be met."""
    kind, dense = draw(kinds), draw(st.sampled_from([DENSE, MERGING]))
    metric, dimensions, seed = draw(metrics), draw(chosen), draw(st.integers(0, 99))
    floor = cost(smallest(kind, dense, dimensions), metric)
    share = draw(st.floats(0, 1))
    limit = int(floor + share * (cost(dense, metric) - floor))
    return kind, dense, metric, limit, dimensions, seed


@given(problems())
@settings(max_examples=80)
def test_the_budget_is_met_within_one_unit(problem):
    _, dense, metric, limit, dimensions, _ = problem
    found = allocate(*problem)
    assert cost(found, metric) <= limit
    for grown in bigger(found, dense, dimensions):
        assert not cost(found, metric) < cost(grown, metric) <= limit


@given(problems())
@settings(max_examples=80)
def test_only_what_may_be_cut_is_cut(problem):
    _, dense, _, _, dimensions, _ = problem
    found = allocate(*problem)
    found.with_blocks(found.blocks)  # is consistent
    for i, (now, before) in enumerate(zip(found.blocks, dense.blocks, strict=True)):
        for dimension in DIMENSIONS:
            size = getattr(now, FIELDS[dimension])
            if dimension not in dimensions:
                assert size == getattr(before, FIELDS[dimension])
            elif dimension == "tokens":
                assert dense.num_prefix_tokens < size <= before.num_tokens_out
            else:
                assert size in grid(dense, i, dimension, STEPS)


@given(kinds, st.sampled_from([DENSE, MERGING]), metrics, st.integers(0, 99))
@settings(max_examples=12)
def test_cost_is_monotone_in_the_budget(kind, dense, metric, seed):
    floor, full = cost(smallest(kind, dense, DIMENSIONS), metric), cost(dense, metric)
    limits = np.linspace(floor, full, 9).astype(int)
    costs = [
        cost(allocate(kind, dense, metric, int(limit), DIMENSIONS, seed), metric)
        for limit in limits
    ]
    assert all(a <= b for a, b in pairwise(costs))
    assert costs[0] == floor
    assert costs[-1] == full


@pytest.mark.parametrize("kind", ["uniform", "marginal"])
@pytest.mark.parametrize("dense", [DENSE, MERGING], ids=["dense", "merging"])
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_the_ends_of_the_scale(kind, dense, metric):
    least = smallest(kind, dense, DIMENSIONS)
    limit = cost(least, metric)
    found = allocate(kind, dense, metric, limit, DIMENSIONS, 0)
    if metric == "macs":
        assert found == least
    assert cost(found, metric) == limit
    with pytest.raises(BudgetError, match=f"{limit - 1:,} {metric}: .* has {limit:,}"):
        allocate(kind, dense, metric, limit - 1, DIMENSIONS, 0)
    assert allocate(kind, dense, metric, cost(dense, metric), DIMENSIONS, 0) == dense


@pytest.mark.parametrize("kind", ["uniform", "marginal"])
def test_merging_removes_no_parameters(kind):
    with pytest.raises(BudgetError, match="params"):
        allocate(kind, DENSE, "params", DENSE.params - 1, ("tokens",), 0)


def test_sizes_are_multiples_of_what_kernels_like():
    sizes = {"num_heads": 3, "qk_dim": 64, "v_dim": 64, "mlp_dim": 768}
    tokens = {"num_tokens_in": 197, "num_tokens_out": 197}
    dense = shape(*[block(**sizes, **tokens)] * 4, num_tokens=197, embed_dim=192)
    steps = Steps.for_shape(dense)
    assert (steps.qk, steps.v, steps.neurons, steps.tokens, steps.heads) == (16, 16, 16, 1, 1)
    for dimensions in (WIDTHS, DIMENSIONS):
        found = allocate_marginal(harm_model(dense, 1), "macs", dense.macs // 2, dimensions, steps)
        uniform = allocate_uniform(dense, "macs", dense.macs // 2, dimensions, steps)
        for b in (*found.blocks, *uniform.blocks):
            assert b.qk_dim % 16 == b.v_dim % 16 == b.mlp_dim % 16 == 0


def test_small_models_get_finer_steps():
    steps = Steps.for_shape(DENSE)
    assert (steps.qk, steps.v, steps.neurons) == (1, 1, 4)


# -- uniform -------------------------------------------------------------------------------------


def test_uniform_cuts_are_alike():
    dense = shape(*[block(num_tokens_in=65, num_tokens_out=65)] * 4, num_tokens=65)
    fine = Steps(tokens=1, qk=1, v=1, neurons=1)
    found = allocate_uniform(dense, "params", dense.params // 2, ("qk", "v", "neurons"), fine)
    for name in ("qk_dim", "v_dim", "mlp_dim"):
        kept = [getattr(b, name) / getattr(d, name) for b, d in zip(found.blocks, dense.blocks)]  # noqa: B905
        assert max(kept) - min(kept) <= 0.3
        assert 0.2 < sum(kept) / 4 < 0.8
    found = allocate_uniform(dense, "macs", int(0.7 * dense.macs), ("tokens",), fine)
    gone = [b.num_tokens_in - b.num_tokens_out for b in found.blocks]
    assert max(gone) - min(gone) <= 3  # what rounding left is given back
    assert min(gone) > 3


# -- marginal ------------------------------------------------------------------------------------

FEW = shape(
    *[block(qk_dim=2, v_dim=2, mlp_dim=3, num_tokens_in=4, num_tokens_out=4)] * 2,
    num_tokens=4,
    embed_dim=5,
    outer_macs=0,
    outer_params=0,
    block_params=0,
)
ONES = Steps(tokens=1, qk=1, v=1, neurons=1, heads=1)


def every_shape(dense: ViTShape) -> list[ViTShape]:
    choices = []
    for i in range(dense.depth):
        sizes = [grid(dense, i, d, ONES) for d in DIMENSIONS]
        choices.append(list(product(*sizes)))
    shapes = []
    for picks in product(*choices):
        tokens, blocks = dense.num_tokens, []
        for old, sizes in zip(dense.blocks, picks, strict=True):
            update = {FIELDS[d]: s for d, s in zip(DIMENSIONS, sizes, strict=True)}
            blocks.append(old.model_copy(update=update | {"num_tokens_in": tokens}))
            tokens = update["num_tokens_out"]
        if all(b.num_tokens_out <= b.num_tokens_in for b in blocks):
            shapes.append(dense.model_copy(update={"blocks": tuple(blocks)}))
    return shapes


@pytest.fixture(scope="module")
def all_shapes() -> list[ViTShape]:
    return every_shape(FEW)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("seed", [0, 1])
def test_dynamic_programming_finds_what_brute_force_finds(all_shapes, metric, seed):
    """At every price, no shape has less of harm + price * cost."""
    rng = np.random.default_rng(seed)
    curves = {}
    for i, d in product(range(2), DIMENSIONS):  # any curves, not even monotone
        sizes = grid(FEW, i, d, ONES)
        values = np.append(rng.uniform(0, 1, len(sizes) - 1), 0.0)
        curves[i, d] = lambda s, x=sizes, y=values: np.interp(s, x, y)
    harm = HarmModel(FEW, curves)
    solver = _Solver(harm, metric, DIMENSIONS, ONES)
    harms = np.array([total(harm, s) for s in all_shapes])
    costs = np.array([cost(s, metric) for s in all_shapes]) / cost(FEW, metric)
    assert len(all_shapes) > 1000
    for price in (0.0, *np.geomspace(0.02, 50, 80)):
        best = solver.solve(price)
        value = total(harm, best) + price * cost(best, metric) / cost(FEW, metric)
        assert value == pytest.approx((harms + price * costs).min(), abs=1e-12)
    assert cost(solver.solve(np.inf), metric) == min(costs) * cost(FEW, metric)


def test_no_cheaper_plan_harms_less(all_shapes):
    """Plans on the lower hull are optimal: none of no more cost has less harm."""
    harm = harm_model(FEW, 3)
    harms = np.array([total(harm, s) for s in all_shapes])
    costs = np.array([s.macs for s in all_shapes])
    solver = _Solver(harm, "macs", DIMENSIONS, ONES)
    seen = set()
    for price in (0.2, 0.5, 1.0, 2.0, 5.0):
        best = solver.solve(price)
        seen.add(best.macs)
        found = allocate_marginal(harm, "macs", best.macs, DIMENSIONS, ONES)
        assert total(harm, found) == pytest.approx(harms[costs <= best.macs].min())
    assert len(seen) > 2


def test_cuts_go_where_they_harm_least():
    def curves(cheap: int) -> HarmModel:
        harm = harm_model(DENSE, 0)
        scale = {i: 0.01 if i == cheap else 1.0 for i in range(3)}
        return HarmModel(
            DENSE,
            {(i, d): lambda s, c=c, w=scale[i]: w * c(s) for (i, d), c in harm.curves.items()},
        )

    for cheap in range(3):
        found = allocate_marginal(curves(cheap), "params", int(0.8 * DENSE.params), WIDTHS, STEPS)
        params = [found.block_param_count(i) for i in range(3)]
        assert min(params) == params[cheap] < sorted(params)[1]


def test_a_dimension_without_harm_goes_first():
    harm = harm_model(DENSE, 0)
    free = {key: c for key, c in harm.curves.items() if key[1] != "qk"}
    model = HarmModel(DENSE, free)
    found = allocate_marginal(model, "macs", int(0.87 * DENSE.macs), ("qk", "neurons"), STEPS)
    assert all(b.mlp_dim == 64 for b in found.blocks)
    assert all(b.qk_dim <= 4 for b in found.blocks)


# -- tuned ---------------------------------------------------------------------------------------


@dataclass
class Measuring:
    """In the place of a simulator: harm by a formula, and what was asked for."""

    truth: HarmModel
    tried: list[ViTShape] = field(default_factory=list)

    def trial(self, found: ViTShape, first: int, rival: Trial | None = None) -> Trial:
        assert first == 0
        self.tried.append(found)
        return Trial(found, total(self.truth, found))


@pytest.mark.parametrize(
    "tilt", [Tilt(tokens=1.5), Tilt(tokens=-1.5), Tilt(width_slope=2.0), Tilt(token_slope=-2.0)]
)
def test_tuning_finds_interactions(tilt):
    harm, limit = harm_model(DENSE, 0), DENSE.macs // 2
    simulator = Measuring(harm.tilted(tilt))
    found = allocate_tuned(harm, simulator, "macs", limit, DIMENSIONS, STEPS)
    plain = allocate_marginal(harm, "macs", limit, DIMENSIONS, STEPS)
    ideal = allocate_marginal(simulator.truth, "macs", limit, DIMENSIONS, STEPS)
    assert found.macs <= limit
    measured = [total(simulator.truth, s) for s in (ideal, found, plain)]
    # What is left over between the best there is and what single cuts promise is mostly found.
    assert measured[1] <= measured[2]
    assert measured[1] - measured[0] <= 0.5 * (measured[2] - measured[0]) + 1e-9
    assert measured[1] == min(total(simulator.truth, s) for s in simulator.tried)


def test_nothing_is_measured_twice():
    harm = harm_model(DENSE, 0)
    simulator = Measuring(harm)
    found = allocate_tuned(harm, simulator, "macs", DENSE.macs // 2, DIMENSIONS, STEPS)
    blocks = [s.blocks for s in simulator.tried]
    assert len(set(blocks)) == len(blocks) <= 25
    # The sum of single harms was right: nothing better is found than what it leads to, or equal.
    plain = allocate_marginal(harm, "macs", DENSE.macs // 2, DIMENSIONS, STEPS)
    assert total(harm, found) <= total(harm, plain)


def test_costs_stay_plain_integers():
    """Numpy's would not go into JSON."""
    found = allocate_marginal(harm_model(DENSE, 0), "macs", DENSE.macs // 2, DIMENSIONS, STEPS)
    assert type(found.macs) is int
    assert {type(size) for b in found.blocks for size in (b.num_tokens_out, b.mlp_dim)} == {int}
