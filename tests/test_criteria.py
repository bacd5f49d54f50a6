"""Criteria against brute force, direct formulas and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import build, images
from vitailor.calibrate import BlockMoments, Moments, dense_sweep
from vitailor.criteria import Order, eliminate, magnitude, output_error, variance
from vitailor.gradients import taylor
from vitailor.hosts import host_of
from vitailor.linalg import add_ridge

seeds = st.integers(0, 10_000)


def case(n: int, outputs: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Moments]:
    """Weights of a linear map, and moments of correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(8 * n, n) * torch.logspace(0, -spread, n, dtype=torch.float64)
    x = x @ draw(n, n) + draw(n)
    moments = Moments.zero(n, x)
    moments.add(x)
    return draw(outputs, n), moments


def error(weight: Tensor, moments: Moments, kept: list[int], ridge: float) -> float:
    """Mean square error of the best affine map from the kept inputs, by least squares."""
    covariance = add_ridge(moments.covariance, ridge)
    root = torch.linalg.cholesky(covariance).T  # root^T root = covariance
    if not kept:
        return float((root @ weight.T).square().sum())
    solution = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution
    return float((root[:, kept] @ solution - root @ weight.T).square().sum())


def brute_force(
    weight: Tensor, moments: Moments, ridge: float, group: int
) -> tuple[list[int], list[float]]:
    """Greedy removal that tries every unit, and the error after each step."""
    left, removed, errors = list(range(weight.shape[1] // group)), [], []
    while left:

        def after(unit: int) -> float:
            kept = [u * group + j for u in left if u != unit for j in range(group)]
            return error(weight, moments, kept, ridge)

        worst = min(left, key=after)
        errors.append(after(worst))
        left.remove(worst)
        removed.append(worst)
    return removed, errors


def errors_of(
    order: Tensor, weight: Tensor, moments: Moments, ridge: float, group: int
) -> list[float]:
    """Error after each step of an order of removal."""
    units, found = order.tolist(), []
    for i in range(len(units)):
        kept = [u * group + j for u in sorted(units[i + 1 :]) for j in range(group)]
        found.append(error(weight, moments, kept, ridge))
    return found


@given(st.integers(1, 7), st.integers(1, 5), seeds, st.sampled_from([1e-6, 1e-3, 0.1]))
def test_elimination_is_greedy_least_squares(n, outputs, seed, ridge):
    weight, moments = case(n, outputs, seed)
    _, expected = brute_force(weight, moments, ridge, 1)
    found = errors_of(eliminate(weight, moments, ridge), weight, moments, ridge, 1)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * expected[-1])


@given(st.integers(1, 4), st.integers(2, 3), seeds)
def test_groups_go_together(units, group, seed):
    weight, moments = case(units * group, 4, seed)
    _, expected = brute_force(weight, moments, 1e-3, group)
    order = eliminate(weight, moments, 1e-3, group=group)
    assert sorted(order.tolist()) == list(range(units))
    found = errors_of(order, weight, moments, 1e-3, group)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * expected[-1])


@pytest.mark.parametrize("seed", range(3))
def test_several_at_a_time_is_nearly_as_good(seed):
    weight, moments = case(64, 16, seed)
    one = errors_of(eliminate(weight, moments, 1e-3), weight, moments, 1e-3, 1)
    many = errors_of(eliminate(weight, moments, 1e-3, steps=16), weight, moments, 1e-3, 1)
    at_random = errors_of(torch.randperm(64), weight, moments, 1e-3, 1)
    for share in (16, 32, 48):
        assert many[share] == pytest.approx(one[share], rel=0.3)
        assert many[share] < 0.7 * at_random[share]


def test_redundant_units_go_first():
    """A copy costs nothing to remove, however large it and its weights are."""
    weight, _ = case(6, 4, 0)
    x = torch.randn(200, 6, dtype=torch.float64)
    x[:, 4] = 30 * x[:, 1] + 5
    weight[:, 4] = 10
    moments = Moments.zero(6, x)
    moments.add(x)
    assert eliminate(weight, moments, 1e-9)[0].item() in (1, 4)


def test_the_weights_given_are_not_changed():
    weight, moments = case(6, 4, 0)
    before = weight.clone(), moments.second.clone()
    eliminate(weight, moments, 1e-3)
    assert torch.equal(weight, before[0])
    assert torch.equal(moments.second, before[1])


def test_what_is_removed_first_comes_last_in_the_order(model, moments):
    tensors = tensors_of(model)
    order = output_error(tensors, moments[0], 1e-3)
    neurons = eliminate(tensors["fc2.weight"], moments[0].hidden, 1e-3)
    assert order.neurons.tolist() == neurons.tolist()[::-1]
    heads = eliminate(tensors["out.weight"].flatten(1), moments[0].mixed, 1e-3, group=4)
    assert order.heads.tolist() == heads.tolist()[::-1]
    assert order.v_dims.tolist() == order.qk_dims.tolist() == [[0, 1, 2, 3]] * 4


# -- all criteria --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(num_heads=4, mlp_ratio=2.0).double()


@pytest.fixture(scope="module")
def moments(model) -> list[BlockMoments]:
    return dense_sweep(model, [images(model, 8)])


def tensors_of(model: nn.Module, index: int = 0) -> dict[str, Tensor]:
    host = host_of(model)
    return host.read(host.block(model, index))


def all_orders(model: nn.Module, moments: list[BlockMoments]) -> dict[str, Order]:
    return {
        "output_error": output_error(tensors_of(model), moments[0], 1e-3),
        "magnitude": magnitude(tensors_of(model)).order(),
        "variance": variance(moments[0]).order(),
        "taylor": taylor(model, [images(model, 4)], False)[0].order(),
    }


def test_orders_are_permutations(model, moments):
    for order in all_orders(model, moments).values():
        for units in (*order.qk_dims, *order.v_dims, order.heads):
            assert sorted(units.tolist()) == list(range(4))
        assert sorted(order.neurons.tolist()) == list(range(32))


def test_criteria_differ(model, moments):
    found = [order.neurons.tolist() for order in all_orders(model, moments).values()]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_permuting_neurons_permutes_the_order(model, moments):
    mixed = torch.randperm(32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        mlp = other.blocks[0].mlp
        mlp.fc1.weight.copy_(mlp.fc1.weight[mixed])
        mlp.fc1.bias.copy_(mlp.fc1.bias[mixed])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, mixed])
    before = all_orders(model, moments)
    after = all_orders(other, dense_sweep(other, [images(model, 8)]))
    for name, order in before.items():
        assert mixed[after[name].neurons].tolist() == order.neurons.tolist(), name
        assert after[name].heads.tolist() == order.heads.tolist()


def test_magnitude_written_out(model):
    tensors, found = tensors_of(model), magnitude(tensors_of(model))
    for h in range(4):
        for d in range(4):
            q, k, v = (tensors[f"{n}.weight"][h, d].norm() for n in "qkv")
            out = tensors["out.weight"][:, h, d].norm()
            torch.testing.assert_close(found.qk_dims[h, d], q * k)
            torch.testing.assert_close(found.v_dims[h, d], v * out)
    for f in range(32):
        written, read = tensors["fc1.weight"][f].norm(), tensors["fc2.weight"][:, f].norm()
        torch.testing.assert_close(found.neurons[f], written * read)
    order = found.order()
    assert order.neurons[0] == found.neurons.argmax()
    assert order.heads[0] == found.v_dims.sum(1).argmax()
    assert torch.equal(order.v_dims[:, -1], found.v_dims.argmin(1))


def test_variance_written_out(model, moments):
    found, block = variance(moments[0]), moments[0]
    torch.testing.assert_close(found.neurons, block.hidden.covariance.diagonal())
    for h in range(4):
        for d in range(4):
            i = 4 * h + d
            torch.testing.assert_close(found.v_dims[h, d], block.mixed.covariance[i, i])
            score = block.query[h, d, d] * block.key[h, d, d]
            torch.testing.assert_close(found.qk_dims[h, d], score)


# -- Taylor --------------------------------------------------------------------------------------


def by_masks(model: nn.Module, x: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """|d loss / d mask| of masks on the outputs of qkv and the inputs of fc2, summed over images."""
    masks, handles = [], []
    for block in model.blocks:
        pair = {"qkv": torch.ones(48).double(), "hidden": torch.ones(32).double()}
        for mask in pair.values():
            mask.requires_grad_()
        masks.append(pair)
        handles.append(block.attn.qkv.register_forward_hook(lambda _, __, y, m=pair["qkv"]: y * m))
        handles.append(
            block.mlp.fc2.register_forward_pre_hook(lambda _, a, m=pair["hidden"]: (a[0] * m,))
        )
    total = [{name: torch.zeros_like(m) for name, m in pair.items()} for pair in masks]
    for image, label in zip(x, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        wanted = [mask for pair in masks for mask in pair.values()]
        grads = iter(torch.autograd.grad(loss, wanted))
        for into in total:
            for name in into:
                into[name] += next(grads).abs()
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("given_labels", [True, False])
def test_taylor_is_the_derivative_by_masks(model, given_labels):
    x, labels = images(model, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    if not given_labels:
        with torch.no_grad():
            labels = model(x).argmax(-1)
    batches = [(x[:4], torch.tensor([0, 1, 2, 3])), (x[4:], torch.tensor([4, 0]))]
    found = taylor(model, batches, use_labels=given_labels)
    for importance, masks in zip(found, by_masks(model, x, labels), strict=True):
        q, k, v = masks["qkv"].unflatten(0, (3, 4, 4))
        torch.testing.assert_close(importance.neurons, masks["hidden"])
        torch.testing.assert_close(importance.v_dims, v)
        torch.testing.assert_close(importance.qk_dims, q + k)


def test_labels_matter(model):
    x = images(model, 4)
    with torch.no_grad():
        others = (model(x).argmax(-1) + 1) % 5
    own, given = taylor(model, [x], False), taylor(model, [(x, others)], True)
    assert not torch.allclose(own[0].neurons, given[0].neurons)


def test_taylor_leaves_no_trace(model):
    taylor(model, [images(model)], False)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_taylor_of_a_frozen_model(model):
    expected = taylor(model, [images(model)], False)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        found = taylor(frozen, [images(model)], False)
    torch.testing.assert_close(found[1].neurons, expected[1].neurons)
