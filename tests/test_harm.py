"""Curves of harm: through what was measured, rising, and zero where nothing is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import block, build, images, shape
from vitailor.bases import rotate
from vitailor.calibrate import dense_sweep
from vitailor.criteria import output_error
from vitailor.harm import HarmModel, Tilt, measure, total
from vitailor.hosts import host_of
from vitailor.shape import ViTShape
from vitailor.simulate import Simulator, Trial
from vitailor.sizes import DIMENSIONS, FIELDS, Dimension, Steps, grid, with_size

STEPS = Steps(tokens=1, qk=1, v=1, neurons=4, heads=1)
DENSE = shape(*[block(num_tokens_in=41, num_tokens_out=41, num_heads=4)] * 3, num_tokens=41)


def changed(found: ViTShape, dense: ViTShape) -> tuple[int, Dimension, int, int]:
    """Block, dimension, size and how much is gone of the one cut of a shape."""
    for i, (now, before) in enumerate(zip(found.blocks, dense.blocks, strict=True)):
        for d in DIMENSIONS:
            gone = getattr(before, FIELDS[d]) - getattr(now, FIELDS[d])
            if gone:
                return i, d, getattr(now, FIELDS[d]), gone
    raise AssertionError("nothing was cut")


@dataclass
class Scripted:
    """In the place of a simulator: harms from a list, or by what was removed."""

    dense: ViTShape
    harms: list[float] = field(default_factory=list)
    seen: dict[tuple[int, Dimension], list[tuple[int, float]]] = field(default_factory=dict)

    def trial(self, found: ViTShape, first: int) -> Trial:
        i, d, size, gone = changed(found, self.dense)
        assert first == i
        harm = self.harms.pop(0) if self.harms else 0.01 * gone**2
        self.seen.setdefault((i, d), []).append((size, harm))
        return Trial(found, harm)


def sizes_of(i: int, dimension: Dimension) -> np.ndarray:
    return np.array(grid(DENSE, i, dimension, STEPS))


def test_every_dimension_is_measured_at_a_few_sizes():
    scripted = Scripted(DENSE)
    harm = measure(scripted, DIMENSIONS, STEPS)
    assert set(harm.curves) == set(scripted.seen) == {(i, d) for i in range(3) for d in DIMENSIONS}
    for (i, d), points in scripted.seen.items():
        tried = [size for size, _ in points]
        assert set(tried) < set(grid(DENSE, i, d, STEPS))
        assert len(tried) == len(set(tried)) <= 5
    assert min(size for size, _ in scripted.seen[0, "tokens"]) == 2  # one patch token


@given(st.lists(st.floats(0, 3), min_size=50, max_size=50))
def test_curves_go_through_the_measurements_and_rise(harms):
    scripted = Scripted(DENSE, list(harms))
    harm = measure(scripted, DIMENSIONS, STEPS)
    for (i, d), points in scripted.seen.items():
        tried, measured = zip(*points, strict=True)
        # Noise may make a deeper cut look better; the curve never falls.
        expected = np.maximum.accumulate(measured)
        np.testing.assert_allclose(harm.table(i, d, np.array(tried)), expected, atol=1e-12)
        rising = harm.table(i, d, sizes_of(i, d)[::-1])
        assert rising[0] == 0
        assert np.isfinite(rising).all()
        assert (np.diff(rising) >= -1e-12).all()


def test_a_quadratic_is_found_exactly_and_continued():
    harm = measure(Scripted(DENSE), DIMENSIONS, STEPS)
    for i in range(3):
        for d in DIMENSIONS:
            sizes = sizes_of(i, d)
            np.testing.assert_allclose(harm.table(i, d, sizes), 0.01 * (sizes[-1] - sizes) ** 2)


def test_noise_below_zero_is_no_harm():
    scripted = Scripted(DENSE, [-1e-9] * 5)
    harm = measure(scripted, ("qk",), STEPS)
    assert (harm.table(0, "qk", sizes_of(0, "qk")) == 0).all()


def test_unmeasured_dimensions_harm_nothing():
    harm = measure(Scripted(DENSE), ("qk",), STEPS)
    assert (harm.table(1, "neurons", sizes_of(1, "neurons")) == 0).all()
    assert set(harm.curves) == {(i, "qk") for i in range(3)}


def test_a_dimension_of_one_size_has_no_curve():
    dense = shape(block(num_heads=1), block(num_heads=1))
    harm = measure(Scripted(dense), ("heads", "v"), STEPS)
    assert set(harm.curves) == {(0, "v"), (1, "v")}


def test_a_model_that_merges_is_where_harm_begins():
    merging = shape(
        block(num_tokens_out=6), block(num_tokens_in=6, num_tokens_out=6), num_tokens=10
    )
    harm = measure(Scripted(merging), ("tokens",), STEPS)
    assert total(harm, merging) == 0
    assert (harm.table(0, "tokens", np.array([6, 8, 10])) == 0).all()
    assert harm.table(0, "tokens", np.array([5]))[0] == pytest.approx(0.01)


# -- sums and tilts ------------------------------------------------------------------------------


def test_harms_add_up():
    harm = measure(Scripted(DENSE), DIMENSIONS, STEPS)
    assert total(harm, DENSE) == 0
    cut = with_size(with_size(DENSE, 0, "qk", 5), 2, "neurons", 52)
    assert total(harm, cut) == pytest.approx(0.01 * 9 + 0.01 * 144)
    # Tokens that an earlier block merged are not lost again.
    once = with_size(DENSE, 0, "tokens", 31)
    assert total(harm, once) == pytest.approx(0.01 * 100)
    twice = with_size(with_size(DENSE, 0, "tokens", 31), 1, "tokens", 26)
    assert total(harm, twice) == pytest.approx(0.01 * 100 + 0.01 * (225 - 100))


def test_tilts():
    harm = measure(Scripted(DENSE), DIMENSIONS, STEPS)

    def at(tilt: Tilt, i: int, d: Dimension, size: int) -> float:
        return float(harm.tilted(tilt).table(i, d, np.array([size]))[0])

    assert at(Tilt(), 0, "qk", 5) == pytest.approx(0.09)
    assert at(Tilt(tokens=math.log(3)), 1, "tokens", 31) == pytest.approx(3.0)
    assert at(Tilt(tokens=math.log(3)), 1, "qk", 5) == pytest.approx(0.09)
    for i, factor in ((0, 0.5), (1, 1.0), (2, 2.0)):
        assert at(Tilt(width_slope=math.log(4)), i, "qk", 5) == pytest.approx(0.09 * factor)
        assert at(Tilt(width_slope=math.log(4)), i, "tokens", 31) == pytest.approx(1.0)
        assert at(Tilt(token_slope=math.log(4)), i, "tokens", 31) == pytest.approx(factor)
    assert at(Tilt(power=0.5), 0, "qk", 5) == pytest.approx(0.3)
    assert harm.tilt == Tilt()
    assert total(harm.tilted(Tilt(1, 2, 3, 0.5)), DENSE) == 0


def test_a_real_model():
    """Whatever is cut harms."""
    model = build(num_heads=4, mlp_ratio=2.0).double()
    x = images(model, 8)
    model, moments = rotate(model, dense_sweep(model, [x]))
    host = host_of(model)
    orders = [
        output_error(host.read(host.block(model, i)), found, 1e-3)
        for i, found in enumerate(moments)
    ]
    simulator = Simulator(model, moments, orders, [x], 1e-3)
    steps = Steps.for_shape(simulator.dense)
    harm = measure(simulator, DIMENSIONS, steps)
    assert isinstance(harm, HarmModel)
    assert set(harm.curves) == {(i, d) for i in range(2) for d in DIMENSIONS}
    for i, d in harm.curves:
        least = grid(simulator.dense, i, d, steps)[0]
        # After the last attention the head only reads the class token, which is never merged.
        harmless = (i, d) == (1, "tokens")
        assert (harm.table(i, d, np.array([least]))[0] > 1e-5) != harmless
