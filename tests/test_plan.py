"""Plans: validation, what they make of a shape, and JSON."""

from __future__ import annotations

import pytest

from conftest import block, shape
from vitailor.errors import PlanError
from vitailor.plan import BlockPlan, Plan
from vitailor.shape import Ranks


def result(plan: BlockPlan, *blocks, **changes):
    """First block after a plan that leaves the other blocks alone."""
    before = shape(*blocks, **changes)
    rest = (BlockPlan(),) * (before.depth - 1)
    return Plan(blocks=(plan, *rest)).result(before).blocks[0]


def test_identity_changes_nothing():
    one = shape(block(num_tokens_out=7), block(num_tokens_in=7, num_tokens_out=5))
    assert Plan.identity(one).result(one) == one


def test_sizes_are_counts_of_what_is_kept():
    plan = BlockPlan(
        heads=(1,),
        qk_dims=((0, 3, 4),),
        v_dims=((1, 2),),
        neurons=tuple(range(0, 64, 2)),
        attn_features=tuple(range(12)),
        mlp_features=(0, 15),
        num_tokens_out=6,
        ranks=Ranks(k=2, fc2=4),
    )
    assert result(plan, block()) == block(
        num_heads=1,
        qk_dim=3,
        v_dim=2,
        mlp_dim=32,
        attn_features=12,
        mlp_features=2,
        num_tokens_out=6,
        ranks=Ranks(k=2, fc2=4),
    )


def test_fewer_tokens_reach_the_blocks_behind():
    after = Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan())).result(shape())
    assert [(b.num_tokens_in, b.num_tokens_out) for b in after.blocks] == [(10, 6), (6, 6)]


def test_merging_of_the_given_model_stays_as_far_as_it_can():
    before = shape(block(), block(num_tokens_out=6))
    after = Plan(blocks=(BlockPlan(num_tokens_out=8), BlockPlan())).result(before)
    assert [b.num_tokens_out for b in after.blocks] == [8, 6]
    after = Plan(blocks=(BlockPlan(num_tokens_out=5), BlockPlan())).result(before)
    assert [b.num_tokens_out for b in after.blocks] == [5, 5]


def test_ranks_and_features_of_the_given_model_stay():
    before = block(ranks=Ranks(fc1=7), attn_features=5)
    after = result(BlockPlan(ranks=Ranks(fc2=3)), before)
    assert after.ranks == Ranks(fc1=7, fc2=3)
    assert after.attn_features == 5


def test_factors_of_the_given_model_go_where_one_layer_costs_no_more():
    before = block(ranks=Ranks(q=8, fc1=7, fc2=5, out=4))
    # q saves nothing as it is, but is the model's own.
    for neurons, ranks in (
        (13, Ranks(q=8, fc1=7, fc2=5, out=4)),  # 7 (16 + 13) < 16 * 13
        (12, Ranks(q=8, fc2=5, out=4)),
        (8, Ranks(q=8, fc2=5, out=4)),  # 5 (16 + 8) < 16 * 8
        (7, Ranks(q=8, out=4)),
    ):
        assert result(BlockPlan(neurons=tuple(range(neurons))), before).ranks == ranks
    assert result(BlockPlan(heads=(0,)), before).ranks == Ranks(fc1=7, fc2=5, out=4)
    assert result(BlockPlan(v_dims=((0,), (1,))), before).ranks == Ranks(q=8, fc1=7, fc2=5)
    asked = BlockPlan(neurons=tuple(range(7)), ranks=Ranks(fc1=6))
    assert result(asked, before).ranks == Ranks(q=8, fc1=6, out=4)


@pytest.mark.parametrize(
    ("plan", "attention", "mlp"),
    [
        (BlockPlan(), False, False),
        (BlockPlan(num_tokens_out=3), False, False),
        (BlockPlan(heads=(0,)), True, False),
        (BlockPlan(qk_dims=((0,),)), True, False),
        (BlockPlan(ranks=Ranks(out=1)), True, False),
        (BlockPlan(attn_features=(0,)), True, False),
        (BlockPlan(neurons=(0,)), False, True),
        (BlockPlan(ranks=Ranks(fc2=1)), False, True),
        (BlockPlan(mlp_features=(0,)), False, True),
    ],
)
def test_what_a_plan_touches(plan, attention, mlp):
    assert (plan.touches_attention, plan.touches_mlp) == (attention, mlp)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"heads": ()}, "heads keeps nothing"),
        ({"heads": (1, 0)}, "heads must be strictly increasing"),
        ({"neurons": (3, 3)}, "neurons must be strictly increasing"),
        ({"neurons": (-1,)}, "neurons"),
        ({"neurons": (1.5,)}, "neurons"),
        ({"attn_features": ()}, "attn_features"),
        ({"mlp_features": (2, 1)}, "mlp_features"),
        ({"qk_dims": ()}, "qk_dims"),
        ({"qk_dims": ((0, 1), (0,))}, "qk_dims must keep equally many"),
        ({"v_dims": ((),)}, "v_dims keeps nothing"),
        ({"v_dims": ((1, 0),)}, "v_dims"),
        ({"num_tokens_out": 0}, "num_tokens_out"),
        ({"keep": 0.5}, "keep"),
    ],
)
def test_validation_names_the_bad_field(fields, field):
    with pytest.raises(ValueError, match=field):
        BlockPlan(**fields)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BlockPlan(heads=(0, 2)), r"blocks\.0\.heads names unit 2"),
        (BlockPlan(qk_dims=((0,),)), r"blocks\.0\.qk_dims lists 1 heads, but 2 are kept"),
        (BlockPlan(heads=(1,), v_dims=((0,), (1,))), r"blocks\.0\.v_dims lists 2 heads, but 1"),
        (BlockPlan(qk_dims=((0,), (8,))), r"blocks\.0\.qk_dims names unit 8"),
        (BlockPlan(v_dims=((0, 9), (0, 1))), r"blocks\.0\.v_dims names unit 9"),
        (BlockPlan(neurons=(64,)), r"blocks\.0\.neurons names unit 64"),
        (BlockPlan(attn_features=(16,)), r"blocks\.0\.attn_features names unit 16"),
        (BlockPlan(mlp_features=(0, 16)), r"blocks\.0\.mlp_features names unit 16"),
        (BlockPlan(num_tokens_out=11), r"blocks\.0\.num_tokens_out is 11"),
        (BlockPlan(num_tokens_out=1), r"blocks\.0\.num_tokens_out is 1"),
        (BlockPlan(ranks=Ranks(fc1=17)), r"blocks\.0\.ranks\.fc1"),
        (BlockPlan(neurons=(0, 1), ranks=Ranks(fc1=3)), r"blocks\.0\.ranks\.fc1"),
    ],
)
def test_a_plan_that_does_not_fit_says_where(plan, message):
    with pytest.raises(PlanError, match=message):
        result(plan, block())


def test_features_of_features_are_relative_to_what_is_read_now():
    with pytest.raises(PlanError, match="names unit 5, but the model has 5"):
        result(BlockPlan(attn_features=(5,)), block(attn_features=5))


def test_the_matching_rule_is_the_models_unless_given():
    before = shape(matching="cosine")
    assert Plan.identity(before).result(before).matching == "cosine"
    asked = Plan(blocks=(BlockPlan(),) * 2, matching="ward")
    assert asked.result(before).matching == "ward"


def test_number_of_blocks_must_agree():
    with pytest.raises(PlanError, match="has 1 blocks, the model has 2"):
        Plan(blocks=(BlockPlan(),)).result(shape())


def test_normalised_queries_keep_their_dims():
    plan = BlockPlan(qk_dims=((0,), (0,)))
    with pytest.raises(PlanError, match="normalises queries and keys"):
        result(plan, block(), qk_norm=1)
    assert result(BlockPlan(heads=(0,)), block(), qk_norm=1).num_heads == 1


def test_json_round_trip():
    one = Plan(
        blocks=(
            BlockPlan(heads=(0,), qk_dims=((1, 2),), num_tokens_out=4, ranks=Ranks(q=1)),
            BlockPlan(),
        )
    )
    assert Plan.from_json(one.to_json()) == one


@pytest.mark.parametrize("version", [0, 2, 99])
def test_unknown_versions_are_refused(version):
    text = Plan(blocks=(BlockPlan(),)).to_json().replace('"version": 1', f'"version": {version}')
    with pytest.raises(PlanError, match="upgrade vitailor"):
        Plan.from_json(text)
