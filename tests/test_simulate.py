"""The simulator computes what the rebuilt model would."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import build, images
from test_surgery import KINDS, dense
from vitailor import simulate
from vitailor.calibrate import dense_sweep
from vitailor.criteria import Order, variance, with_match_features
from vitailor.factors import gain_of
from vitailor.hosts import host_of, shape_of
from vitailor.mlp_ranks import MAPS, set_ranks
from vitailor.orders import plan_for
from vitailor.plan import BlockPlan, Plan
from vitailor.reconstruct import compensate
from vitailor.shape import ViTShape, revise
from vitailor.simulate import Simulator, divergence
from vitailor.sizes import with_block, with_size
from vitailor.surgery import apply

MODELS = {kind: dense(kind) for kind in KINDS}
BATCHES = {kind: list(images(m, 6).split(4)) for kind, m in MODELS.items()}
MOMENTS = {kind: dense_sweep(m, BATCHES[kind]) for kind, m in MODELS.items()}


def orders_of(kind: str) -> list[Order]:
    return [with_match_features(variance(found).order(), found) for found in MOMENTS[kind]]


def simulator_of(kind: str, ridge: float | None, **settings: Any) -> Simulator:
    return Simulator(MODELS[kind], MOMENTS[kind], orders_of(kind), BATCHES[kind], ridge, **settings)


def rebuilt(kind: str, shape: ViTShape, ridge: float | None) -> nn.Module:
    """The model really cut to a shape, compensated from the dense model's moments."""
    model = MODELS[kind]
    host, plan = host_of(model), plan_for(shape_of(model), shape, orders_of(kind))
    small = apply(model, plan)
    for i, cut in enumerate(plan.blocks):
        if ridge is not None:
            dense = host.read(host.block(model, i))
            gain = gain_of(host.block(model, i), "fc2")
            refit = compensate(dense, cut, MOMENTS[kind][i], ridge, gain)
            host.write(host.block(small, i), refit, shape.blocks[i].ranks)
    return small


@st.composite
def shapes(draw: st.DrawFn, dense: ViTShape) -> ViTShape:
    """Any sizes, of any dimensions."""
    found = dense
    for i, block in enumerate(dense.blocks):
        for dimension, full in (
            ("heads", block.num_heads),
            ("qk", 0 if dense.qk_norm else block.qk_dim),
            ("v", block.v_dim),
            ("neurons", block.mlp_dim),
        ):
            if full and draw(st.booleans()):
                found = with_size(found, i, dimension, draw(st.integers(1, full)))
        for name in MAPS:
            if draw(st.booleans()):
                full = min(found.linears_of(found.blocks[i])[name])
                rank = draw(st.integers(1, full))
                found = with_block(found, i, set_ranks(found.blocks[i], **{name: rank}))
        if draw(st.booleans()):
            low, high = dense.num_prefix_tokens + 1, found.blocks[i].num_tokens_in
            found = with_size(found, i, "tokens", draw(st.integers(low, high)))
    return found


@given(st.data(), st.sampled_from(list(KINDS)), st.sampled_from([None, 1e-3]))
@settings(max_examples=60)
def test_outputs_are_those_of_the_rebuilt_model(data, kind, ridge):
    matching = data.draw(st.sampled_from(["attention", "ward", "cosine"]))
    compared = data.draw(st.none() | st.integers(1, 16))
    dense = revise(shape_of(MODELS[kind]), matching=matching, match_features=compared)
    shape = data.draw(shapes(dense))
    simulator = simulator_of(kind, ridge, matching=matching, compared=compared)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Tensor] = []

        def listen(outputs: Tensor, truth: Tensor, num_classes: int) -> Tensor:
            seen.append(outputs)
            return divergence(outputs, truth, num_classes)

        patch.setattr(simulate, "divergence", listen)
        trial = simulator.trial(shape, 0)
    x = torch.cat(BATCHES[kind])
    with torch.no_grad():
        expected = rebuilt(kind, shape, ridge)(x)
        truth = MODELS[kind](x)
    found = torch.cat(seen)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert trial.shape is shape
    harm = float(divergence(expected, truth, dense.num_classes).mean())
    assert trial.harm == pytest.approx(harm, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_tokens_are_paired_by_the_rule_of_the_shape():
    """The rules part ways once tokens stand for different numbers."""
    model = build(img_size=48, depth=3).double()
    x = images(model, 8)
    moments = dense_sweep(model, [x])
    orders = [variance(found).order() for found in moments]
    harms = []
    for matching in ("ward", "cosine"):
        simulator = Simulator(model, moments, orders, [x], None, matching)
        shape = with_size(with_size(simulator.dense, 0, "tokens", 25), 1, "tokens", 12)
        small = apply(model, plan_for(shape_of(model), shape, orders))
        harms.append(simulator.trial(shape, 0).harm)
        assert harms[-1] == pytest.approx(float(divergence(small(x), model(x), 5).mean()), rel=1e-4)
    assert abs(harms[0] - harms[1]) > 0.01 * harms[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_no_harm(kind):
    simulator = simulator_of(kind, 1e-3)
    for first in range(2):
        assert simulator.trial(simulator.dense, first).harm == 0
    assert simulator.evaluations == 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(2, 10))
def test_a_later_start_changes_nothing(qk, v, neurons, tokens):
    simulator = simulator_of("plain", 1e-3)
    shape = simulator.dense
    for dimension, size in (("qk", qk), ("v", v), ("neurons", neurons), ("tokens", tokens)):
        shape = with_size(shape, 1, dimension, size)
    assert simulator.trial(shape, 1).harm == simulator.trial(shape, 0).harm


def test_trials_leave_no_trace():
    """Any order of trials gives the same, and the model stays."""
    before = copy.deepcopy(MODELS["plain"].state_dict())
    simulator = simulator_of("plain", 1e-3)
    small = with_size(with_size(simulator.dense, 0, "tokens", 4), 1, "neurons", 5)
    first = simulator.trial(small, 0).harm
    simulator.trial(with_size(simulator.dense, 1, "heads", 1), 1)
    assert simulator.trial(small, 0).harm == first > 0
    assert simulator_of("plain", 1e-3).trial(small, 0).harm == first
    assert all(torch.equal(t, before[n]) for n, t in MODELS["plain"].state_dict().items())


@torch.no_grad()
def test_a_model_that_merges_already():
    model = apply(MODELS["plain"], Plan(blocks=(BlockPlan(num_tokens_out=7), BlockPlan())))
    batches = BATCHES["plain"]
    moments = dense_sweep(model, batches)
    orders = [variance(found).order() for found in moments]
    simulator = Simulator(model, moments, orders, batches, None)
    assert simulator.dense == shape_of(model)
    assert simulator.trial(simulator.dense, 0).harm == 0
    shape = with_size(with_size(simulator.dense, 0, "tokens", 5), 1, "v", 2)
    x = torch.cat(batches)
    small = apply(model, plan_for(simulator.dense, shape, orders))
    harm = float(divergence(small(x), model(x), 5).mean())
    assert simulator.trial(shape, 0).harm == pytest.approx(harm, rel=1e-4)


# -- divergence ----------------------------------------------------------------------------------


def test_divergence_of_classes():
    got, truth = torch.randn(3, 5), torch.randn(3, 5)
    t = simulate.TEMPERATURE
    p, q = F.softmax(truth / t, -1), F.softmax(got / t, -1)
    torch.testing.assert_close(divergence(got, truth, 5), t**2 * (p * (p / q).log()).sum(-1))
    assert (divergence(truth, truth, 5) == 0).all()
    torch.testing.assert_close(divergence(truth + 3, truth, 5), torch.zeros(3), atol=1e-5, rtol=0)


def test_harm_sees_changes_of_images_that_the_model_is_sure_of():
    sure, unsure = torch.tensor([[12.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    change = torch.tensor([[-1.0, 1.0, 0.0]])
    seen = [float(divergence(x + change, x, 3)) for x in (sure, unsure)]
    assert 0.1 < seen[0] / seen[1] < 1
    plain = [
        float(
            F.kl_div(
                (x + change).log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="sum"
            )
        )
        for x in (sure, unsure)
    ]
    assert plain[0] / plain[1] < 1e-3


@pytest.mark.parametrize("num_classes", [0, 1])
def test_divergence_of_features(num_classes):
    truth = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    got = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    found = divergence(got, truth, num_classes)
    torch.testing.assert_close(found, torch.tensor([1 / 25, 0.0]))
    assert torch.isfinite(divergence(got, torch.zeros(2, 2), num_classes)).all()


@pytest.mark.parametrize("factor", [1.05, 1.2])
def test_a_trial_far_behind_its_rival_is_given_up(monkeypatch, factor):
    monkeypatch.setattr(simulate, "GIVE_UP_AFTER", 4)
    monkeypatch.setattr(simulate, "BEHIND", 1.1)
    simulator = simulator_of("plain", 1e-3)  # batches of four and two images
    shape = with_size(simulator.dense, 0, "tokens", 4)
    alone = simulator.trial(shape, 0)
    assert alone.harm == pytest.approx(sum(alone.sums) / 6)
    assert len(alone.sums) == 2
    rival = replace(alone, sums=tuple(s / factor for s in alone.sums))
    found = simulator.trial(shape, 0, rival)
    if factor < 1.1:
        assert found == alone
    else:
        assert found.harm == inf
        assert found.sums == alone.sums[:1]


def test_without_the_tokens_before_every_block_trials_start_at_the_first():
    full, light = (simulator_of("plain", 1e-3, any_start=any_start) for any_start in (True, False))
    shape = with_size(full.dense, 1, "neurons", 5)
    assert full.trial(shape, 1).harm == light.trial(shape, 0).harm
    with pytest.raises(IndexError):
        light.trial(shape, 1)
