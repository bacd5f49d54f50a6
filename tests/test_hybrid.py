"""Low rank for attention and pruning for the feed-forward halves."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vitailor as vt
from conftest import build, images
from test_compression import same_state
from vitailor.budget import cost
from vitailor.criteria import explained
from vitailor.errors import BudgetError, UsageError
from vitailor.hosts import shape_of
from vitailor.methods import ClosedForm, Hybrid
from vitailor.plan import BlockPlan, Plan
from vitailor.shape import DENSE
from vitailor.surgery import apply

TRAINING = vt.TrainConfig(epochs=2, batch_size=8, lr=1e-3, hflip=0.0, distill="soft", alpha=0.5)
FORMS = list(itertools.product(["per-head", "factors"], [None, 0.5]))


def labeled(model: nn.Module, count: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, count, seed=3), torch.arange(count) % 5)]


def cut(model: nn.Module, budget: vt.Budget, count: int = 24, **settings: Any) -> nn.Module:
    method = Hybrid(**settings)
    train = labeled(model) if method.training else None
    return vt.compress(model, method, budget, data=[images(model, count)], train=train)


# -- what inputs explain ---------------------------------------------------------------------------


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 200))
def test_what_inputs_explain_is_what_regression_on_them_leaves(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    found = explained(weight, x.mT @ x / len(x), order, 1e-12)
    for kept in range(n + 1):
        known, y = x[:, order[:kept]], x @ weight.mT
        left = y - known @ torch.linalg.lstsq(known, y).solution if kept else y
        expected = left.square().sum() / len(x)
        assert torch.isclose(found[kept:].sum(), expected, rtol=1e-6, atol=1e-8 * float(y.var()))


# -- without training ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize(("form", "attention"), FORMS)
def test_a_plain_smaller_model_within_the_budget(form, attention, metric, tmp_path):
    model = build(embed_dim=32)
    before = copy.deepcopy(model)
    small = cut(model, vt.Budget(**{metric: 0.7}), form=form, attention=attention)
    assert same_state(model, before)
    dense, shape = shape_of(model), shape_of(small)
    share = cost(shape, metric) / cost(dense, metric)
    assert 0.66 < share <= 0.7
    assert shape.params == sum(p.numel() for p in small.parameters())
    (step,) = small.vitailor.steps
    assert step.plan.result(dense) == shape
    for was, now in zip(dense.blocks, shape.blocks, strict=True):
        assert now.num_tokens_out == was.num_tokens_out
        assert now.num_heads == was.num_heads
        assert (now.ranks.fc1, now.ranks.fc2) == (None, None)
        if form == "factors":
            assert (now.qk_dim, now.v_dim) == (was.qk_dim, was.v_dim)
        else:
            assert now.ranks == DENSE
        if attention is not None and form == "per-head":
            assert (now.qk_dim, now.v_dim) == (was.qk_dim // 2, was.v_dim // 2)
    assert any(b.mlp_dim < 128 for b in shape.blocks)
    vt.save(small, tmp_path / "small")
    x = images(model, 3, seed=9)
    assert torch.equal(vt.load(tmp_path / "small")(x), small(x))


def test_shares_of_attention_and_hidden_units_follow_the_papers_arithmetic():
    """Half of the blocks' weights: with rank k of d features, p = 1/4 + k/d of the hidden units go."""
    model = build(embed_dim=64, num_heads=4)
    shape = shape_of(model)
    weights = 12 * 64**2 * shape.depth
    for k in (8, 16):
        biases = (1 / 4 + k / 64) * 4 * 64 * shape.depth  # of the hidden units that go
        limit = round(shape.params - weights / 2 - biases)
        method = Hybrid(form="factors", attention=k / 64, compensation=False)
        small = vt.compress(model, method, vt.Budget(params=limit), data=[images(model, 16)])
        for block in shape_of(small).blocks:
            assert {
                rank for name, rank in block.ranks if name.startswith(("q", "k", "v", "out"))
            } == {k}
            assert block.mlp_dim == (3 / 4 - k / 64) * 4 * 64


def test_per_head_without_training_is_the_closed_form_on_widths():
    model = build()
    data, budget = [images(model, 24)], vt.Budget(macs=0.7)
    ours = vt.compress(model, Hybrid(), budget, data=data)
    closed = ClosedForm(dimensions=("qk", "v", "neurons"))
    assert same_state(ours, vt.compress(model, closed, budget, data=data))


@pytest.mark.parametrize(("form", "attention"), FORMS)
def test_compensation_is_nearer_on_the_images_it_saw(form, attention):
    model = build(embed_dim=32)
    x, budget, losses = images(model, 48), vt.Budget(macs=0.6), []
    method = Hybrid(form=form, attention=attention)
    small = vt.compress(model, method, budget, data=[x])
    plain = method.model_copy(update={"compensation": False})
    for other in (small, vt.compress(model, plain, budget, data=[x])):
        with torch.no_grad():
            losses.append(float((other(x) - model(x)).square().mean()))
    assert losses[0] < losses[1]


def test_a_budget_that_keeps_all_leaves_the_model():
    model = build()
    assert same_state(cut(model, vt.Budget(macs=1.0)), model)


# -- with training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["per-head", "factors"])
def test_gates_decide_on_hidden_units_of_the_model_at_low_rank(form, tmp_path):
    model = build(embed_dim=32)
    budget = vt.Budget(params=0.7)
    method = Hybrid(form=form, attention=0.5, scores="gates", training=TRAINING)
    data, train = [images(model, 24)], labeled(model)
    small = vt.compress(model, method, budget, data=data, train=train, folder=tmp_path)
    shape = shape_of(small)
    assert 0.66 * shape_of(model).params < shape.params <= 0.7 * shape_of(model).params
    assert small.vitailor.steps[0].plan.result(shape_of(model)) == shape
    facts = small.vitailor.record["facts"]
    assert set(facts["kept"]) == {"neurons"}
    assert len(facts["finetune"]["losses"]) == 2
    assert {p.name for p in tmp_path.iterdir()} >= {"sparse", "finetune"}
    again = vt.compress(model, method, budget, data=data, train=train, folder=tmp_path, resume=True)
    assert same_state(again, small)
    # The hidden units left are not those that the training-free criterion would keep.
    other = vt.compress(model, Hybrid(form=form, attention=0.5), budget, data=data).vitailor.steps[
        0
    ]
    mine = small.vitailor.steps[0]
    assert [b.neurons for b in mine.plan.blocks] != [b.neurons for b in other.plan.blocks]
    assert [b.qk_dims for b in mine.plan.blocks] == [b.qk_dims for b in other.plan.blocks]


def test_fine_tuning_after_compensation_learns_from_the_dense_model():
    model = build()
    budget, x = vt.Budget(macs=0.6), images(model, 16, seed=3)
    config = TRAINING.model_copy(update={"alpha": 1.0, "epochs": 8})
    losses = []
    for training in (None, config):
        small = cut(model, budget, training=training)
        with torch.no_grad():
            losses.append(float((small(x).softmax(-1) - model(x).softmax(-1)).square().mean()))
    assert losses[1] < 0.5 * losses[0]


# -- bad input ---------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_any_work():
    model = build()
    with pytest.raises(UsageError, match="learned in training"):
        cut(model, vt.Budget(macs=0.5), scores="gates")
    for form, attention in FORMS:
        with pytest.raises(BudgetError):
            Hybrid(form=form, attention=attention).check(shape_of(model), vt.Budget(macs=0.05))
    low = apply(model, Plan(blocks=(BlockPlan(ranks={"q": 3}), BlockPlan())))
    with pytest.raises(UsageError, match="low-rank projections already"):
        cut(low, vt.Budget(macs=0.5))


def test_on_the_command_line_training_is_a_choice(tmp_path):
    from vitailor.cli.compress import make_method

    plain = make_method("hybrid", {}, {"form": "factors"}, {}, None, False)
    assert plain == Hybrid(form="factors")
    given = make_method("hybrid", {}, {"training.alpha": "0.5"}, {"epochs": 3}, "somewhere", False)
    assert given == Hybrid(training=vt.TrainConfig(alpha=0.5, epochs=3))
    assert make_method("hybrid", {}, {}, {}, "somewhere", True) == Hybrid(training=vt.TrainConfig())
    with pytest.raises(UsageError, match="needs training images"):
        make_method("hybrid", {}, {}, {"epochs": 3}, None, False)
    with pytest.raises(UsageError, match="nothing to resume"):
        make_method("hybrid", {}, {}, {}, None, True)
