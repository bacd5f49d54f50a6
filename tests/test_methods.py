"""What methods share, latency budgets, and distillation."""

from __future__ import annotations

import pytest

from conftest import shape
from vitailor.allocate import allocate_uniform
from vitailor.budget import Budget
from vitailor.errors import BudgetError, UsageError
from vitailor.methods import METHODS, VTP, ClosedForm, Hybrid, LowRank, MultiDim, TokenMerge
from vitailor.methods.base import within
from vitailor.shape import ViTShape
from vitailor.sizes import Steps

DENSE = shape()
WIDTHS = ("qk", "v", "neurons")

# -- settings ------------------------------------------------------------------------------------


def test_methods_are_found_by_name():
    assert {
        "closed-form": ClosedForm,
        "token-merge": TokenMerge,
        "vtp": VTP,
        "low-rank": LowRank,
        "hybrid": Hybrid,
        "multi-dim": MultiDim,
    } == METHODS


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        (ClosedForm, {"ridges": 1.0}, "ridges"),
        (ClosedForm, {"ridge": 0.0}, "ridge"),
        (ClosedForm, {"criterion": "luck"}, "criterion"),
        (ClosedForm, {"dimensions": ()}, "dimensions"),
        (ClosedForm, {"dimensions": ("depth",)}, "dimensions"),
        (ClosedForm, {"harm_images": 0}, "harm_images"),
        (ClosedForm, {"tune_images": -1}, "tune_images"),
        (ClosedForm, {"refine": -1}, "refine"),
        (ClosedForm, {"refine_lr": 0}, "refine_lr"),
        (TokenMerge, {"matching": "random"}, "matching"),
        (TokenMerge, {"ridge": 1.0}, "ridge"),
    ],
)
def test_bad_settings_are_usage_errors(method, settings, named):
    with pytest.raises(UsageError, match=named) as caught:
        method(**settings)
    assert "Settings: " in caught.value.fix


def test_settings_are_frozen_and_keyword_only():
    method = ClosedForm(ridge=0.1)
    with pytest.raises(ValueError, match="frozen"):
        method.ridge = 0.2
    with pytest.raises(TypeError):
        ClosedForm(0.1)


def test_only_given_labels_are_needed():
    assert ClosedForm(criterion="taylor", taylor_labels="given").needs_labels
    assert not ClosedForm(criterion="taylor").needs_labels
    assert not ClosedForm(taylor_labels="given").needs_labels
    assert not TokenMerge().needs_labels


@pytest.mark.parametrize(
    "method", [ClosedForm(), ClosedForm(allocation="uniform"), ClosedForm(dimensions=("qk",))]
)
def test_normalised_queries_and_keys_are_never_cut(method):
    normed = shape(qk_norm=2)
    if method.dimensions:
        with pytest.raises(UsageError, match="normalises"):
            method.check(normed, Budget(macs=0.9))
    else:
        assert "qk" not in method._dimensions(normed, Budget(macs=0.9))
        assert "qk" in method._dimensions(DENSE, Budget(macs=0.9))


@pytest.mark.parametrize(
    "method", [ClosedForm(), ClosedForm(allocation="uniform"), ClosedForm(dimensions=("qk", "v"))]
)
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_what_no_plan_can_meet_is_known_beforehand(method, metric):
    with pytest.raises(BudgetError, match=f"No plan meets 10 {metric}: the smallest"):
        method.check(DENSE, Budget(**{metric: 10}))
    method.check(DENSE, Budget(**{metric: 0.9}))


# -- latency -------------------------------------------------------------------------------------


def cut(metric: str, limit: int) -> ViTShape:
    return allocate_uniform(DENSE, metric, limit, WIDTHS, Steps())


def clock(shapes: list[ViTShape]) -> list[float]:
    """A device on which a dense model takes 10 ms, of which 1 ms is overhead."""
    return [1 + 9 * s.macs / DENSE.macs for s in shapes]


@pytest.mark.parametrize(
    ("budget", "milliseconds"), [(Budget(latency_ms=6.5), 6.5), (Budget(latency=0.8), 8.0)]
)
def test_a_latency_budget_is_met_and_used(budget, milliseconds):
    found = within(budget, DENSE, cut, clock)
    (taken,) = clock([found])
    assert 0.9 * milliseconds < taken <= milliseconds


def test_other_budgets_are_not_measured():
    def broken(shapes: list[ViTShape]) -> list[float]:
        raise AssertionError("measured")

    assert within(Budget(macs=0.7), DENSE, cut, broken).macs <= 0.7 * DENSE.macs
    assert within(Budget(params=0.7), DENSE, cut, broken).params <= 0.7 * DENSE.params


def test_a_latency_that_nothing_reaches():
    with pytest.raises(BudgetError, match=r"latency_ms 0.5: the dense model takes 10.00 ms"):
        within(Budget(latency_ms=0.5), DENSE, cut, clock)


def test_a_model_that_cannot_be_cut_at_all():
    def refuse(metric: str, limit: int) -> ViTShape:
        raise BudgetError("never")

    with pytest.raises(BudgetError, match=r"No plan found runs within latency 0.5\."):
        within(Budget(latency=0.5), DENSE, refuse, clock)
