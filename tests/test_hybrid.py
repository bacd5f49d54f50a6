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
from conftest import build, images, layer_scaled
from test_compression import same_state
from vitailor.budget import cost
from vitailor.calibrate import dense_sweep
from vitailor.criteria import explained, output_error
from vitailor.errors import BudgetError, UsageError
from vitailor.hosts import host_of, shape_of
from vitailor.methods import ClosedForm, Hybrid
from vitailor.plan import BlockPlan, Plan
from vitailor.reconstruct import compensate
from vitailor.shape import DENSE, ViTShape
from vitailor.surgery import apply, select
from vitailor.training import fit

TRAINING = vt.TrainConfig(epochs=2, batch_size=8, lr=1e-3, hflip=0.0, distill="soft", alpha=0.5)
#: Form, share of attention, and a budget at which attention is cut.
FORMS = [
    ("per-head", None, 0.7),
    ("per-head", 0.5, 0.7),
    ("factors", None, 0.4),
    ("factors", 0.25, 0.7),
]


def attention_is_cut(before: ViTShape, after: ViTShape, form: str) -> bool:
    pairs = list(zip(before.blocks, after.blocks, strict=True))
    if form == "factors":
        return any(now.ranks != DENSE for _, now in pairs)
    return any(now.qk_dim < was.qk_dim or now.v_dim < was.v_dim for was, now in pairs)


def labeled(model: nn.Module, count: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, count, seed=3), torch.arange(count) % 5)]


def cut(model: nn.Module, budget: vt.Budget, count: int = 24, **settings: Any) -> nn.Module:
    method = Hybrid(**settings)
    train = labeled(model) if method.training else None
    return vt.compress(model, method, budget, data=[images(model, count)], train=train)


# -- what inputs explain ---------------------------------------------------------------------------


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 200))
def test_what_inputs_explain_is_what_is_left_without_them(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    refitted = explained(weight, x.mT @ x / len(x), order, 1e-12)
    as_it_is = explained(weight, x.mT @ x / len(x), order, None)
    for kept in range(n + 1):
        known, y = x[:, order[:kept]], x @ weight.mT
        least = y - known @ torch.linalg.lstsq(known, y).solution if kept else y
        plain = y - known @ weight[:, order[:kept]].mT
        for energies, left in ((refitted, least), (as_it_is, plain)):
            expected, slack = left.square().sum() / len(x), 1e-8 * float(y.square().sum())
            assert torch.isclose(energies[kept:].sum(), expected, rtol=1e-6, atol=slack)


def test_what_inputs_explain_survives_moments_that_rounding_made_indefinite():
    broken = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 - 1e-6, 0.0], [0.0, 0.0, 0.0]]).double()
    found = explained(torch.ones(2, 3).double(), broken, torch.arange(3), 1e-12)
    assert torch.isfinite(found).all()
    assert found.sum() == pytest.approx(8.0, rel=1e-3)


# -- without training ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize(("form", "attention", "keep"), FORMS)
def test_a_plain_smaller_model_within_the_budget(form, attention, keep, metric, tmp_path):
    model = build(embed_dim=32)
    before = copy.deepcopy(model)
    small = cut(model, vt.Budget(**{metric: keep}), form=form, attention=attention)
    assert same_state(model, before)
    dense, shape = shape_of(model), shape_of(small)
    share = cost(shape, metric) / cost(dense, metric)
    assert keep - 0.04 < share <= keep
    assert attention_is_cut(dense, shape, form)
    if (form, attention, metric) == ("factors", None, "params"):  # within one hidden unit
        assert int(keep * dense.params) - shape.params < 2 * 32 + 1
        plain = cut(model, vt.Budget(params=0.7), form=form, compensation=False)
        assert int(0.7 * dense.params) - shape_of(plain).params < 2 * 32 + 1
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
            assert {rank for name, rank in block.ranks if name in ("q", "k", "v", "out")} == {k}
            assert block.mlp_dim == (3 / 4 - k / 64) * 4 * 64


def test_per_head_without_training_is_the_closed_form_on_widths():
    model = build()
    data, budget = [images(model, 24)], vt.Budget(macs=0.7)
    ours = vt.compress(model, Hybrid(), budget, data=data)
    closed = ClosedForm(dimensions=("qk", "v", "neurons"))
    assert same_state(ours, vt.compress(model, closed, budget, data=data))


@pytest.mark.parametrize(("form", "attention", "keep"), FORMS)
def test_compensation_is_nearer_on_the_images_it_saw(form, attention, keep):
    model = build(embed_dim=32)
    x, budget, losses = images(model, 48), vt.Budget(macs=keep), []
    method = Hybrid(form=form, attention=attention)
    small = vt.compress(model, method, budget, data=[x])
    plain = method.model_copy(update={"compensation": False})
    for other in (small, vt.compress(model, plain, budget, data=[x])):
        with torch.no_grad():
            losses.append(float((other(x) - model(x)).square().mean()))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_hidden_units_are_budgeted_by_what_they_lose(name, compensation):
    """The energies' tails are the errors of the MLP's output, as it reaches the residual stream."""
    model = build(name, embed_dim=32)
    x = images(model, 64)
    method = Hybrid(form="factors", compensation=compensation, ridge=1e-9)
    host, (moments, *_) = host_of(model), dense_sweep(model, [x])
    block = host.block(model, 0)
    tensors, gain = host.read(block), block.gains()[1]
    order = output_error(tensors, moments, 1e-9, block.gains())
    energies = method._energies(tensors, moments.hidden, order, gain)
    hidden = hidden_of(block, model, x)
    for kept in (8, 64, 127):
        plan = BlockPlan(neurons=tuple(sorted(order.neurons[:kept].tolist())))
        refit = compensate(tensors, plan, moments, 1e-9)
        new = refit if compensation else select(tensors, plan)
        old_out = hidden @ tensors["fc2.weight"].double().mT + tensors["fc2.bias"].double()
        new_out = hidden[:, list(plan.neurons)] @ new["fc2.weight"].double().mT
        lost = old_out - new_out - new["fc2.bias"].double()
        lost = lost if gain is None else lost * gain.double()
        expected = float(lost.square().sum(1).mean())
        assert float(energies[kept:].sum()) == pytest.approx(expected, rel=0.02, abs=1e-9)


@torch.no_grad()
def hidden_of(block: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """(tokens of all images, hidden units) activations of a block's MLP."""
    seen: list[Tensor] = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0].double().flatten(0, 1)


def test_factors_are_compensated_for_more_than_hidden_units_alone():
    model = build(embed_dim=32)
    small = cut(model, vt.Budget(macs=0.4), form="factors")
    errors = small.vitailor.record["facts"]["errors"]
    for block, own in zip(shape_of(small).blocks, errors, strict=True):
        assert set(own) == {name for name, rank in block.ranks if rank is not None}
        assert all(0 < error < 1 for error in own.values())


def test_a_budget_that_keeps_all_leaves_the_model():
    model = build()
    assert same_state(cut(model, vt.Budget(macs=1.0)), model)


# -- with training -----------------------------------------------------------------------------------


GATED = [("per-head", 0.5, 0.7), ("factors", 0.25, 0.7), ("factors", None, 0.4)]


@pytest.mark.parametrize(("form", "attention", "keep"), GATED)
def test_gates_decide_on_hidden_units_of_the_model_at_low_rank(form, attention, keep, tmp_path):
    model = build(embed_dim=32)
    budget, data, train = vt.Budget(params=keep), [images(model, 24)], labeled(model)
    method = Hybrid(form=form, attention=attention, scores="gates", training=TRAINING)
    small = vt.compress(model, method, budget, data=data, train=train, folder=tmp_path)
    dense, shape = shape_of(model), shape_of(small)
    assert (keep - 0.04) * dense.params < shape.params <= keep * dense.params
    assert attention_is_cut(dense, shape, form)
    (mine,) = small.vitailor.steps
    assert mine.plan.result(dense) == shape
    facts = small.vitailor.record["facts"]
    assert set(facts["kept"]) == {"neurons"}
    assert len(facts["finetune"]["losses"]) == 2
    if attention is not None:  # alike in all blocks
        assert len({block.mlp_dim for block in shape.blocks}) <= 2
    again = vt.compress(model, method, budget, data=data, train=train, folder=tmp_path, resume=True)
    assert same_state(again, small)
    free = method.model_copy(update={"scores": "output_error", "training": None})
    (other,) = vt.compress(model, free, budget, data=data).vitailor.steps
    for own, its in zip(mine.plan.blocks, other.plan.blocks, strict=True):
        assert (own.qk_dims, own.v_dims, own.ranks) == (its.qk_dims, its.v_dims, its.ranks)
    # But hidden units stay that the training-free criterion would not keep.
    assert [b.neurons for b in mine.plan.blocks] != [b.neurons for b in other.plan.blocks]


def test_other_calibration_images_are_another_model(tmp_path):
    model, train = build(), labeled(build())
    method = Hybrid(form="factors", attention=0.25, training=TRAINING)
    one, other = [images(model, 24)], [images(model, 24, seed=5)]
    same = {"train": train, "folder": tmp_path}
    vt.compress(model, method, vt.Budget(params=0.7), data=one, **same)
    with pytest.raises(UsageError, match="calibration"):
        vt.compress(model, method, vt.Budget(params=0.7), data=other, resume=True, **same)


def test_factors_of_the_weights_alone():
    model = build()
    settings = {"form": "factors", "attention": 0.25, "compensation": False}
    aware, plain = (
        cut(model, vt.Budget(macs=0.8), activation_aware=own, **settings) for own in (True, False)
    )
    host = host_of(model)
    before, after, other = (host.read(host.block(m, 0)) for m in (model, plain, aware))
    for name in ("q", "k", "v"):
        weight, found = (t[f"{name}.weight"].flatten(0, 1) for t in (before, after))
        best = torch.linalg.svdvals(weight)[4:].norm()  # no other four directions lose less
        torch.testing.assert_close((weight - found).norm(), best)
        assert torch.equal(before[f"{name}.bias"], after[f"{name}.bias"])
        assert (weight - other[f"{name}.weight"].flatten(0, 1)).norm() > 1.001 * best
        # What inputs see: the bias takes up what is lost of the mean.
        assert not torch.equal(before[f"{name}.bias"], other[f"{name}.bias"])


def test_layer_scale_weighs_what_factors_write():
    model, folded = layer_scaled()
    a, b = (cut(m, vt.Budget(macs=0.6), form="factors") for m in (model, folded))
    assert a.vitailor.steps[0].plan == b.vitailor.steps[0].plan
    x = images(model, 8)
    torch.testing.assert_close(a(x), b(x), rtol=1e-2, atol=1e-3)


def test_gates_learn_from_the_dense_model(monkeypatch):
    model = build()
    asked: list[bool] = []

    def listen(*args: Any, **more: Any) -> Any:
        asked.append(same_state(more["teacher"], model))
        return fit(*args, **more)

    monkeypatch.setattr("vitailor.methods.vtp.fit", listen)
    monkeypatch.setattr("vitailor.methods.stages.fit", listen)
    cut(model, vt.Budget(macs=0.7), attention=0.5, scores="gates", training=TRAINING)
    assert asked == [True, True]


@pytest.mark.parametrize("form", ["per-head", "factors"])
def test_a_measured_latency_can_be_resumed(form, tmp_path, monkeypatch):
    """The clock never agrees with itself, and what was made before training is what goes on."""
    model = build(embed_dim=32)
    noise = itertools.cycle([1.0, 1.1, 0.9, 1.05])
    monkeypatch.setattr(
        "vitailor.tasks._stopwatch",
        lambda models, device: [shape_of(m).macs * next(noise) / 1e6 for m in models],
    )
    method = Hybrid(form=form, attention=0.25, training=TRAINING)
    data, train, budget = [images(model, 24)], labeled(model), vt.Budget(latency=0.7)
    first, again = (
        vt.compress(model, method, budget, data=data, train=train, folder=tmp_path, resume=resume)
        for resume in (False, True)
    )
    assert same_state(first, again)
    with pytest.raises(UsageError, match="another budget"):
        vt.compress(
            model,
            method,
            vt.Budget(latency=0.6),
            data=data,
            train=train,
            folder=tmp_path,
            resume=True,
        )


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
    for form, attention, _ in FORMS:
        with pytest.raises(BudgetError):
            Hybrid(form=form, attention=attention).check(shape_of(model), vt.Budget(macs=0.05))
    with pytest.raises(UsageError, match="cost no less"):
        cut(model, vt.Budget(macs=0.5), form="factors", attention=0.5)
    with pytest.raises(UsageError, match="not to a latency"):
        cut(model, vt.Budget(latency=0.5), scores="gates", training=TRAINING)
    with pytest.raises(UsageError, match="as real inputs see them"):
        cut(model, vt.Budget(macs=0.5), activation_aware=False)
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
