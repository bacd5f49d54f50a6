"""Bent harm models: the middle of the cube bends nothing, and every direction lands on the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_policy import deit_small
from vitailor.allocate import allocate_marginal
from vitailor.harm import HarmModel
from vitailor.harm_space import NEUTRAL, HarmSpace
from vitailor.sizes import DIMENSIONS, FIELDS, Steps

DENSE = deit_small()
STEPS = Steps()
LIMIT = int(0.6 * DENSE.macs)


def quadratic(full: int, scale: float):
    return lambda size: scale * (1 - np.asarray(size, dtype=float) / full) ** 2


#: A token that goes is gone in all later blocks: it must harm more not to go first.
SCALE = {"tokens": 20.0, "qk": 1.0, "v": 1.0, "neurons": 1.0, "heads": 4.0}
HARM = HarmModel(
    DENSE,
    {
        (i, d): quadratic(getattr(DENSE.blocks[i], FIELDS[d]), SCALE[d] * (1 + 0.05 * i))
        for i in range(DENSE.depth)
        for d in DIMENSIONS
    },
)
SPACE = HarmSpace(HARM, DIMENSIONS, STEPS)


def test_the_middle_is_the_harm_as_measured():
    assert SPACE.first == (NEUTRAL,) * 8
    middle = SPACE.on_budget(dict(zip(SPACE.names, SPACE.first, strict=True)), "macs", LIMIT)
    assert middle == allocate_marginal(HARM, "macs", LIMIT, DIMENSIONS, STEPS)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8), st.sampled_from(["macs", "params"]))
@settings(max_examples=12)
def test_every_direction_lands_on_the_budget(values, metric):
    limit = int(0.7 * getattr(DENSE, metric))
    shape = SPACE.on_budget(dict(zip(SPACE.names, values, strict=True)), metric, limit)
    assert 0.97 * limit < getattr(shape, metric) <= limit


@pytest.mark.parametrize("dimension", ["neurons", "tokens", "v"])
def test_what_counts_less_is_cut_more(dimension):
    def left(value: float) -> int:
        shape = SPACE.on_budget({dimension: value}, "macs", LIMIT)
        return sum(getattr(block, FIELDS[dimension]) for block in shape.blocks)

    assert left(0.1) < left(0.5) < left(0.9)


def test_depth_decides_where():
    def late(value: float) -> int:
        shape = SPACE.on_budget({"widths by depth": value}, "macs", LIMIT)
        return shape.blocks[-1].mlp_dim - shape.blocks[0].mlp_dim

    assert late(0.1) < late(0.5) < late(0.9)


def test_only_what_may_be_cut_has_a_number():
    assert HarmSpace(HARM, ("tokens",), STEPS).names == ("tokens", "tokens by depth", "exponent")
    assert HarmSpace(HARM, ("v",), STEPS).names == ("v", "widths by depth", "exponent")
