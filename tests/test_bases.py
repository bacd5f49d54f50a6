"""Rotation into sorted bases: another parameterisation of the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import build, images
from test_surgery import KINDS, dense
from vitailor.bases import rotate
from vitailor.calibrate import dense_sweep
from vitailor.criteria import magnitude
from vitailor.hosts import host_of
from vitailor.plan import BlockPlan, Plan
from vitailor.surgery import apply


def rotated(kind: str = "plain", calibration: int = 8):
    """A model, the same rotated, and the moments of each."""
    model = dense(kind)
    moments = dense_sweep(model, [images(model, calibration)])
    return model, moments, *rotate(model, moments)


def tensors_of(model: nn.Module, index: int = 0) -> dict[str, torch.Tensor]:
    host = host_of(model)
    return host.read(host.block(model, index))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_stay(kind):
    model, _, other, _ = rotated(kind)
    x = images(model, 3, seed=5)  # not what the bases were found on
    expected = model(x)
    assert type(other) is type(model)
    assert (other(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not torch.equal(tensors_of(other)["v.weight"], tensors_of(model)["v.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_and_its_moments_are_untouched(kind):
    model = dense(kind)
    moments = dense_sweep(model, [images(model, 4)])
    weights, found = copy.deepcopy(model.state_dict()), copy.deepcopy(moments)
    rotate(model, moments)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    for a, b in zip(moments, found, strict=True):
        assert torch.equal(a.query, b.query)
        assert torch.equal(a.mixed.second, b.mixed.second)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_rotated_model(kind):
    model, _, other, moments = rotated(kind)
    swept = dense_sweep(other, [images(model, 8)])
    for a, b in zip(moments, swept, strict=True):
        assert_close(a.query, b.query)
        assert_close(a.key, b.key)
        assert_close(a.mixed.mean, b.mixed.mean)
        assert_close(a.mixed.covariance, b.mixed.covariance)
        assert_close(a.hidden.second, b.hidden.second)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-7 * max(1.0, float(b.abs().max()))


def test_normalised_queries_and_keys_are_left_alone():
    model, _, other, _ = rotated("qk norm")
    for i in range(2):
        before, after = tensors_of(model, i), tensors_of(other, i)
        for name in ("q.weight", "q.bias", "k.weight", "k.bias"):
            assert torch.equal(after[name], before[name])


def test_biases_are_folded():
    model, _, other, _ = rotated()
    before, after = tensors_of(model), tensors_of(other)
    assert before["k.bias"].abs().max() > 0.1  # or this would show nothing
    assert before["v.bias"].abs().max() > 0.1
    assert (after["k.bias"] == 0).all()
    assert (after["v.bias"] == 0).all()
    moved = torch.einsum("dhv,hv->d", before["out.weight"], before["v.bias"])
    torch.testing.assert_close(after["out.bias"], before["out.bias"] + moved)


def test_a_value_bias_without_an_output_bias_stays():
    model = build(num_heads=4).double()
    for block in model.blocks:
        block.attn.proj.bias = None
    other, _ = rotate(model, dense_sweep(model, [images(model, 8)]))
    x = images(model, seed=5)
    torch.testing.assert_close(other(x), model(x))
    assert tensors_of(other)["v.bias"].abs().max() > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutting_sorted_dims_loses_less_than_cutting_small_ones(size):
    """In mean square of the logits, for independent queries and keys."""
    model, moments, _, sorted_moments = rotated(calibration=32)
    for i in range(2):
        small = magnitude(tensors_of(model, i)).order().qk_dims[:, size:]
        first = torch.arange(size, 4).expand(4, -1)
        by_magnitude = lost_logits(moments[i].query, moments[i].key, small)
        ours = lost_logits(sorted_moments[i].query, sorted_moments[i].key, first)
        assert (ours <= by_magnitude * (1 + 1e-9)).all()
        assert ours.sum() < by_magnitude.sum()


def lost_logits(query: torch.Tensor, key: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Mean square of q_R^T k_R of the removed dims for independent queries and keys, per head."""
    lost = []
    for head, dims in enumerate(gone):
        lost.append((query[head][dims][:, dims] * key[head][dims][:, dims]).sum())
    return torch.stack(lost)


@torch.no_grad()
def test_dims_that_carry_nothing_come_last():
    """With queries, keys and values in half the dims, the other half can go for nothing."""
    model = build(num_heads=2).double()
    for block in model.blocks:
        mix = torch.randn(8, 8, dtype=torch.float64)
        project = mix[:, :4] @ torch.linalg.pinv(mix[:, :4])
        for start in (16, 24, 32, 40):  # keys and values of both heads
            rows = slice(start, start + 8)
            block.attn.qkv.weight[rows] = project @ block.attn.qkv.weight[rows]
            block.attn.qkv.bias[rows] = project @ block.attn.qkv.bias[rows]
    x = images(model, 16)
    other, _ = rotate(model, dense_sweep(model, [x]))
    kept = ((0, 1, 2, 3), (0, 1, 2, 3))
    plan = Plan(blocks=(BlockPlan(qk_dims=kept, v_dims=kept),) * 2)
    expected = model(x)
    assert (apply(other, plan)(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (apply(model, plan)(x) - expected).abs().max() > 1e-2 * expected.abs().max()
