"""Policies, and directions that land on a budget."""

from __future__ import annotations

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from conftest import build
from vitailor.budget import cost
from vitailor.errors import BudgetError, UsageError
from vitailor.hosts import shape_of
from vitailor.mlp_ranks import MAPS, SAVED, set_ranks
from vitailor.plan import BlockPlan, Plan
from vitailor.policy import TOKEN_BLOCKS, Policy, Space, sized, sizes_of, token_blocks
from vitailor.shape import DENSE, Ranks, ViTShape
from vitailor.sizes import Steps, with_block
from vitailor.surgery import apply, hollow

ONES = Steps(tokens=1, qk=1, v=1, neurons=1, heads=1, ranks=1)
#: Ratios that the paper's authors released for DeiT-S at 40% of its MACs.
NEURONS = (
    0.12237108874196195, 0.0016794058589378435, 0.012005382829619993, 0.4906234312878825,
    0.10388374301953818, 0.32759023302933327, 0.020071736058675516, 0.26372455118527965,
    0.024650168550521934, 0.3719701291610246, 0.33795538016728416, 0.32449325124705586,
)  # fmt: skip
HEADS = (
    0.07641353049968264, 0.05489026765880206, 0.11644351795005797, 0.211892036592978,
    0.10277295497512584, 0.04059573685727791, 0.07933396548132304, 0.08570715841196291,
    0.2767074423853168, 0.16642825871548983, 0.134454033467508, 0.1596743366205926,
)  # fmt: skip
TOKENS = 0.4880722732779675


def released_macs(shape: ViTShape, ratio: float) -> int:
    """MACs as the released code counts them: blocks alone, tokens without the fused ones."""
    total, dim = 0, shape.embed_dim
    head = dim // 6
    tokens = [int(197 * (1 - ratio) ** (i // 3)) for i in range(12)]
    for i, block in enumerate(shape.blocks):
        arriving = tokens[i - 1] if i in (3, 6, 9) else tokens[i]
        total += 2 * tokens[i] * dim * block.mlp_dim
        total += block.num_heads * (4 * dim * head * arriving + 2 * arriving**2 * head)
    return total


def deit_small() -> ViTShape:
    import torch

    with torch.device("meta"):
        return shape_of(timm.create_model("deit_small_patch16_224"))


def test_the_released_policy_gives_the_released_sizes():
    dense = deit_small()
    tokens = tuple(TOKENS if i in (3, 6, 9) else 0.0 for i in range(12))
    policy = Policy(neurons=NEURONS, heads=HEADS, tokens=tokens)
    shape = policy.apply(dense, ONES, fused=True)
    assert [b.num_heads for b in shape.blocks] == [5, 5, 5, 4, 5, 5, 5, 5, 4, 5, 5, 5]
    assert [b.mlp_dim for b in shape.blocks] == [
        1348, 1533, 1517, 782, 1376, 1032, 1505, 1130, 1498, 964, 1016, 1037,
    ]  # fmt: skip
    assert [b.num_tokens_out for b in shape.blocks] == [197] * 3 + [101] * 3 + [52] * 3 + [27] * 3
    assert released_macs(dense, 0.0) == pytest.approx(4.541e9, abs=5e5)
    assert released_macs(shape, TOKENS) == pytest.approx(1.863e9, abs=5e5)
    # The whole model, fused tokens too, is counted by us; patch embedding and head are in it.
    assert released_macs(shape, TOKENS) < shape.macs < 1.1 * released_macs(shape, TOKENS)
    assert Policy.from_json(policy.to_json()) == policy


def break_even(shape: ViTShape, i: int, name: str) -> float:
    """Where a rank of r costs as much as one layer: r (m + n) = m n."""
    m, n = shape.linears()[i][name]
    return m * n / (m + n)


def direction(space: Space, values: list[float]) -> dict[str, float]:
    return {p.name: v for p, v in zip(space.parameters, values, strict=False)}


@given(
    st.lists(st.floats(0, 1), min_size=15, max_size=15),
    st.sampled_from(["macs", "params"]),
    st.floats(0.35, 0.98),
    st.sampled_from([1, 2, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_direction_lands_on_the_budget(values, metric, keep, stages, nearest, fused, ranks):
    dense = shape_of(build(depth=4, num_heads=4))
    dimensions = ("neurons", "heads", *("ranks",) * ranks, *("tokens",) * (metric == "macs"))
    rounding = {"nearest": nearest, "fused": fused}
    space = Space(dense, dimensions, stages, token_blocks=(2, 3), steps=ONES, **rounding)
    limit = int(keep * cost(dense, metric))
    shape = space.on_budget(direction(space, values), metric, limit)
    assert cost(shape, metric) <= limit
    shape.with_blocks(shape.blocks)  # valid
    # Within one of the smallest units: no neuron fits any more where one is missing.
    for i, block in enumerate(shape.blocks):
        if block.mlp_dim < dense.blocks[i].mlp_dim:
            more = block.model_copy(update={"mlp_dim": block.mlp_dim + 1})
            blocks = (*shape.blocks[:i], more, *shape.blocks[i + 1 :])
            assert cost(shape.with_blocks(blocks), metric) > limit
    # Factors save something everywhere, and no more rank fits.
    for i, block in enumerate(shape.blocks):
        chosen = [(rank, name) for name, rank in block.ranks if rank is not None]
        assert bool(chosen) <= ranks
        for rank, name in chosen:
            even = break_even(shape, i, name)
            assert rank <= (1 - SAVED) * even or rank == 1 < even
            more = rank + 1 if rank + 1 <= (1 - SAVED) * even else None
            higher = set_ranks(block, **{name: more})
            assert cost(with_block(shape, i, higher), metric) > limit
    found = sized(dense, sizes_of(shape, dimensions), [block.fuses for block in shape.blocks])
    assert found == shape


@given(st.floats(0, 0.95), st.floats(0, 0.95), st.integers(1, 5), st.booleans())
def test_ranks_cost_what_their_ratio_leaves(neurons, ratio, step, nearest):
    dense = shape_of(build())
    steps = Steps(neurons=1, ranks=step)
    policy = Policy(neurons=(neurons, 0.0), ranks=(ratio, 0.0))
    wide = Policy(neurons=policy.neurons).apply(dense, steps, nearest=nearest)
    shape = policy.apply(dense, steps, nearest=nearest)
    before, block = wide.blocks[0], shape.blocks[0]
    assert block.model_copy(update={"ranks": DENSE}) == before
    assert shape.blocks[1] == dense.blocks[1]
    for name in MAPS:
        rank, (fan_in, fan_out) = getattr(block.ranks, name), shape.linears_of(block)[name]
        if ratio < SAVED:
            assert rank is None
        if rank is None:
            continue
        even = fan_in * fan_out / (fan_in + fan_out)
        assert rank % step == 0
        assert abs(rank - (1 - ratio) * even) <= step
        assert rank * (fan_in + fan_out) <= (1 - SAVED) * fan_in * fan_out or rank == step < even
    assert shape.block_macs(0) <= wide.block_macs(0)
    # What is counted is what is there.
    small = hollow(build(), shape)
    assert shape_of(small) == shape
    assert sum(p.numel() for p in small.parameters()) == shape.params


def test_a_map_that_is_hardly_cheaper_in_two_stays_one():
    """The rank of 80% of the cost, and one layer beyond, also where a step of rank is given back."""
    dense = shape_of(build())
    assert break_even(dense, 0, "fc1") == pytest.approx(12.8)
    found = [Policy(ranks=(r, r)).apply(dense, ONES).blocks[0].ranks for r in (0.19, 0.21, 0.5)]
    assert found == [DENSE, Ranks(fc1=10, fc2=10), Ranks(fc1=6, fc2=6)]
    space = Space(dense, ("ranks",), stages=1, steps=ONES)
    tight = space.on_budget({"ranks 1-2": 1.0}, "params", dense.params - 200)
    ranks = [rank for block in tight.blocks for _, rank in block.ranks if rank is not None]
    # One map at rank 10 saves 224 of 1,024 weights; the other three are whole again.
    assert ranks == [10]
    # Rounded to the nearest, 10.24 would be 12, which saves too little.
    coarse = Policy(ranks=(0.2, 0.2)).apply(dense, Steps(ranks=4), nearest=True)
    assert {block.ranks for block in coarse.blocks} == {Ranks(fc1=8, fc2=8)}
    assert space.names == ("ranks 1-2",)
    # Three steps more fit.
    five = Policy(ranks=(0.6, 0.6)).apply(dense, ONES)
    assert {block.ranks for block in five.blocks} == {Ranks(fc1=5, fc2=5)}
    more = space.on_budget({"ranks 1-2": 1.0}, "params", five.params + 3 * 80)
    assert [b.ranks for b in more.blocks] == [Ranks(fc1=8, fc2=5), Ranks(fc1=5, fc2=5)]


def test_no_step_of_any_rank_fits_any_more():
    """Nor of the map that has more rank, where a step of the other does not fit."""
    dense = shape_of(build(embed_dim=64, mlp_ratio=2.0, depth=1))
    space = Space(dense, ("ranks",), stages=1, steps=Steps(ranks=16))
    for limit in range(37_000, dense.params, 150):
        shape = space.on_budget({"ranks 1": 1.0}, "params", limit)
        ranks = shape.blocks[0].ranks
        for name in MAPS:
            rank = getattr(ranks, name)
            if rank is not None:
                more = rank + 16 if rank + 16 <= 0.8 * break_even(dense, 0, name) else None
                higher = set_ranks(shape.blocks[0], **{name: more})
                assert with_block(shape, 0, higher).params > limit


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(1, 12), st.booleans())
def test_cost_never_rises_with_the_scale(values, step, nearest):
    dense = shape_of(build(depth=1))
    steps = Steps(neurons=1, ranks=step)
    space = Space(dense, ("neurons", "heads", "ranks"), stages=1, steps=steps, nearest=nearest)
    costs = [space.shape(direction(space, values), s / 10).macs for s in range(1, 200)]
    assert costs == sorted(costs, reverse=True)


def test_ranks_that_cannot_be_lowered_are_refused():
    dense = shape_of(build())
    for settings in ({"most": 0.19}, {"steps": Steps(ranks=13)}):
        with pytest.raises(UsageError, match="no rank saves anything"):
            Space(dense, ("neurons", "ranks"), stages=1, **settings)


def test_ranks_are_not_chosen_for_a_model_that_has_some():
    low = apply(build(), Plan(blocks=(BlockPlan(ranks=Ranks(out=3)), BlockPlan())))
    with pytest.raises(UsageError, match="low-rank projections already"):
        Policy(ranks=(0.5, 0.5)).apply(shape_of(low), ONES)


def test_rounded_to_the_nearest_a_small_ratio_takes_no_head():
    dense = shape_of(build(depth=2, num_heads=4))
    policy = Policy(heads=(0.1, 0.3))
    assert [b.num_heads for b in policy.apply(dense, ONES).blocks] == [3, 2]
    assert [b.num_heads for b in policy.apply(dense, ONES, nearest=True).blocks] == [4, 3]


def test_tokens_go_at_like_places_in_models_of_other_depths():
    assert token_blocks(12) == TOKEN_BLOCKS
    assert token_blocks(24) == (7, 13, 19)
    assert all(max(token_blocks(depth)) <= depth for depth in range(2, 40))


def test_directions_are_free_and_scale_is_not():
    dense = deit_small()
    space = Space(dense)
    assert [p.name for p in space.parameters] == [
        "neurons 1-4", "neurons 5-8", "neurons 9-12", "heads 1-4", "heads 5-8", "heads 9-12",
        "tokens 4-10",
    ]  # fmt: skip
    limit = int(0.5 * dense.macs)
    values = [0.9, 0.5, 0.2, 0.1, 0.3, 0.6, 0.4]
    half = [v / 2 for v in values]
    shapes = [space.on_budget(direction(space, v), "macs", limit) for v in (values, half)]
    assert shapes[0] == shapes[1]
    early, late = (shapes[0].blocks[i].mlp_dim for i in (0, 11))
    assert early < late
    assert len(Space(dense, stages=None).parameters) == 25
    apart = Space(dense, tokens_apart=True)
    assert apart.names[-3:] == ("tokens 4", "tokens 7", "tokens 10")
    steep = dict.fromkeys(apart.names, 0.5) | {"tokens 7": 1.0}
    ratios = apart.policy(steep, 0.6).tokens
    assert [ratios[i] for i in (3, 6, 9)] == pytest.approx([0.3, 0.6, 0.3])
    assert sum(ratios) == pytest.approx(1.2)
    more = Space(dense, ("ranks", "neurons", "heads", "qk", "v", "tokens"), stages=1)
    every = ["neurons", "heads", "qk", "v", "ranks", "tokens"]
    assert [p.dimension for p in more.parameters] == every


def test_what_cannot_be_is_refused():
    dense = shape_of(build())
    with pytest.raises(BudgetError, match="No policy meets"):
        Space(dense, ("heads",), stages=1).on_budget({"heads 1-2": 1.0}, "macs", dense.macs // 10)
    with pytest.raises(UsageError, match="stages do not fit"):
        Space(dense, stages=5, token_blocks=(1,))
    with pytest.raises(UsageError, match="cannot go in blocks"):
        Space(dense, stages=1, token_blocks=(7,))
    with pytest.raises(UsageError, match="no dimension"):
        Space(dense, ())
    with pytest.raises(UsageError, match="for 3 blocks"):
        Policy(heads=(0.1, 0.1, 0.1)).apply(dense, ONES)
    with pytest.raises(ValueError, match="different numbers"):
        Policy(heads=(0.1,), neurons=(0.1, 0.2))
