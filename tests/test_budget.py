"""Budgets: exactly one limit, absolute as int, a fraction as float."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import shape
from vitailor.budget import Budget, cost
from vitailor.errors import BudgetError, UsageError


@pytest.mark.parametrize(
    ("limits", "metric", "value", "text"),
    [
        ({"macs": 0.6}, "macs", 0.6, "macs 0.6"),
        ({"macs": 750_000_000}, "macs", 750_000_000, "macs 750,000,000"),
        ({"params": 1.0}, "params", 1.0, "params 1"),
        ({"latency_ms": 5.0}, "latency_ms", 5.0, "latency_ms 5"),
        ({"latency": 0.5}, "latency", 0.5, "latency 0.5"),
    ],
)
def test_one_limit(limits, metric, value, text):
    budget = Budget(**limits)
    assert (budget.metric, budget.value, str(budget)) == (metric, value, text)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": None},
        {"macs": 0},
        {"macs": -3},
        {"macs": 0.0},
        {"macs": 1.5},
        {"macs": "0.5"},
        {"macs": True},
        {"macs": float("nan")},
        {"params": float("inf")},
        {"latency_ms": 0.0},
        {"latency": 1.1},
        {"flops": 0.5},
    ],
)
def test_everything_else_is_refused(limits):
    with pytest.raises(UsageError, match="Budget: field") as caught:
        Budget(**limits)
    assert "fraction" in caught.value.fix


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_one_as_float_is_all_and_as_int_one_unit(metric):
    one = shape()
    assert Budget(**{metric: 1.0}).limit(one) == cost(one, metric)
    assert Budget(**{metric: 1}).limit(one) == 1


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_a_fraction_is_never_rounded_up(fraction):
    one = shape()
    limit = Budget(macs=fraction).limit(one)
    assert fraction * one.macs - 1 < limit <= fraction * one.macs


def test_an_absolute_limit_is_taken_as_it_is():
    assert Budget(params=10**12).limit(shape()) == 10**12


@pytest.mark.parametrize("limits", [{"latency": 0.5}, {"latency_ms": 1.0}])
def test_latency_has_no_closed_form(limits):
    with pytest.raises(BudgetError, match="no closed form"):
        Budget(**limits).limit(shape())


def test_budgets_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Budget(macs=0.5).macs = 0.6
