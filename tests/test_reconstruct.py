"""Compensation: what is redundant goes without loss, and nothing gets worse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import build, images, layer_scaled
from plans import subsets
from vitailor import tokens
from vitailor.calibrate import BlockMoments, Moments, dense_sweep
from vitailor.decompose import decompose
from vitailor.hosts import host_of, shape_of
from vitailor.plan import BlockPlan, Plan
from vitailor.reconstruct import (
    compensate,
    compensate_fc2,
    compensate_out,
    match_mean_outputs,
    sequential_sweep,
)
from vitailor.shape import Ranks
from vitailor.surgery import apply, select

TINY_RIDGE = 1e-12
HEADS, V, NEURONS = 4, 4, 32
NO_BIAS = {"qkv_bias": False, "proj_bias": False}


def make(**overrides: Any) -> nn.Module:
    return build(num_heads=HEADS, mlp_ratio=2.0, **overrides).double()


def tensors_of(model: nn.Module, index: int = 0) -> dict[str, Tensor]:
    host = host_of(model)
    return host.read(host.block(model, index))


def moments_of(x: Tensor) -> Moments:
    found = Moments.zero(x.shape[-1], x)
    found.add(x)
    return found


def block_moments(mixed: Tensor, hidden: Tensor) -> BlockMoments:
    unused = torch.zeros(HEADS, V, V, dtype=torch.float64)
    inputs = Moments.zero(16, unused)
    return BlockMoments(unused, unused, moments_of(mixed), inputs, moments_of(hidden))


def draw(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def outputs(tensors: dict[str, Tensor], mixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the output projections make of their inputs."""
    out = mixed @ tensors["out.weight"].flatten(1).T + tensors.get("out.bias", 0)
    return out, hidden @ tensors["fc2.weight"].T + tensors.get("fc2.bias", 0)


# -- one block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "v_dims", "both", "neurons"])
def test_affine_combinations_of_what_is_kept_go_without_loss(kind):
    plan = {
        "heads": BlockPlan(heads=(0, 2)),
        "v_dims": BlockPlan(v_dims=((0, 1), (1, 3), (0, 2), (2, 3))),
        "both": BlockPlan(heads=(1, 3), v_dims=((0, 1, 2), (1, 2, 3))),
        "neurons": BlockPlan(neurons=tuple(range(0, NEURONS, 3))),
    }[kind]
    mixed, hidden = draw(300, HEADS * V), draw(300, NEURONS, seed=1)
    heads = plan.heads or tuple(range(HEADS))
    dims = plan.v_dims or ((0, 1, 2, 3),) * len(heads)
    kept_mixed = [h * V + d for h, row in zip(heads, dims, strict=True) for d in row]
    kept_hidden = list(plan.neurons or range(NEURONS))
    for x, kept in ((mixed, kept_mixed), (hidden, kept_hidden)):
        gone = [i for i in range(x.shape[1]) if i not in kept]
        x[:, gone] = x[:, kept] @ draw(len(kept), len(gone), seed=2) + draw(len(gone), seed=3)
    tensors = tensors_of(make())
    small = compensate(tensors, plan, block_moments(mixed, hidden), TINY_RIDGE)
    expected = outputs(tensors, mixed, hidden)
    found = outputs(small, mixed[:, kept_mixed], hidden[:, kept_hidden])
    plain = outputs(select(tensors, plan), mixed[:, kept_mixed], hidden[:, kept_hidden])
    for i in range(2):
        assert (found[i] - expected[i]).abs().max() <= 1e-9 * expected[i].abs().max()
    lost = max(float((plain[i] - expected[i]).abs().max()) for i in range(2))
    assert lost > 0.1


@given(st.data(), st.sampled_from([1e-9, 1e-3, 1.0, 100.0]), st.integers(0, 1000), st.booleans())
def test_compensation_never_harms(data, ridge, seed, biases):
    """On the moments it was made for, at every ridge, with means and without biases to take them up."""
    plan = BlockPlan(
        heads=data.draw(subsets(HEADS)), neurons=data.draw(subsets(NEURONS)), v_dims=None
    )
    mixed = draw(80, 16, seed=seed) @ draw(16, 16, seed=seed + 1) + 9 * draw(16, seed=seed + 2)
    hidden = draw(80, 32, seed=seed) @ draw(32, 32, seed=seed + 1) + 9 * draw(32, seed=seed + 2)
    tensors = tensors_of(MODEL if biases else BARE)
    columns = [h * V + d for h in plan.heads for d in range(V)]
    kept = mixed[:, columns], hidden[:, list(plan.neurons)]
    expected = outputs(tensors, mixed, hidden)
    better = compensate(tensors, plan, block_moments(mixed, hidden), ridge)
    found = outputs(better, *kept)
    plain = outputs(select(tensors, plan), *kept)
    for i in range(2):
        error = (found[i] - expected[i]).square().mean()
        assert error <= (plain[i] - expected[i]).square().mean() * (1 + 1e-9) + 1e-12


def test_only_the_output_projections_are_refitted():
    plan = BlockPlan(heads=(1, 2), neurons=tuple(range(8)), qk_dims=((0, 1), (1, 2)))
    tensors = tensors_of(MODEL)
    found = compensate(tensors, plan, block_moments(draw(50, 16), draw(50, 32)), 1e-3)
    plain = select(tensors, plan)
    refitted = {"out.weight", "out.bias", "fc2.weight", "fc2.bias"}
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == refitted


def test_a_block_whose_outputs_are_not_cut_is_only_selected():
    plan = BlockPlan(qk_dims=((0, 1),) * HEADS)
    tensors = tensors_of(MODEL)
    found = compensate(tensors, plan, block_moments(draw(50, 16), draw(50, 32)), 1e-3)
    assert all(torch.equal(t, found[n]) for n, t in select(tensors, plan).items())


def test_without_biases_only_weights_are_refitted():
    tensors = tensors_of(make(**NO_BIAS))
    plan = BlockPlan(heads=(0, 1), neurons=(1, 2, 3))
    found = compensate(tensors, plan, block_moments(draw(50, 16), draw(50, 32)), 1e-3)
    assert "out.bias" not in found
    assert found["out.weight"].shape == (16, 2, V)


MODEL, BARE = make(), make(**NO_BIAS)


# -- the whole model -----------------------------------------------------------------------------

#: Keeps the first of every pair of neurons, and the first half of every head's V dims.
HALF = BlockPlan(v_dims=((0, 1),) * HEADS, neurons=tuple(range(0, NEURONS, 2)))
MERGING = (7, 4)


@torch.no_grad()
def redundant(**overrides: Any) -> nn.Module:
    """A model whose neurons come in pairs and whose V dims are copies, as `HALF` undoes."""
    model = make(**overrides)
    for block in model.blocks:
        fc1, qkv = block.mlp.fc1, block.attn.qkv
        fc1.weight[1::2] = fc1.weight[::2].clone()
        v = qkv.weight[32:].unflatten(0, (HEADS, V))  # a view
        v[:, 2:] = 0.5 * v[:, :2].clone()
        if qkv.bias is not None:
            fc1.bias[1::2] = fc1.bias[::2].clone()
            # Not half of the others': only an affine fit takes it up.
            assert qkv.bias[32:].unflatten(0, (HEADS, V))[:, 2:].abs().max() > 0.1
    return model


def plan_of(merging: tuple[int, ...] | None, block: BlockPlan = HALF) -> Plan:
    counts = merging or (None, None)
    blocks = tuple(block.model_copy(update={"num_tokens_out": n}) for n in counts)
    return Plan(blocks=blocks, matching="ward")


@pytest.mark.parametrize("merging", [None, MERGING])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_a_sweep_over_redundant_units_loses_nothing(name, merging):
    model = redundant(name=name)
    plan = plan_of(merging)
    small = apply(model, plan)
    plain = copy.deepcopy(small)
    calibration, x = images(model, 12), images(model, 3, seed=7)
    sequential_sweep(model, small, plan, calibration.split(5), TINY_RIDGE)
    expected = apply(model, plan_of(merging, BlockPlan()))(x)
    assert (small(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (plain(x) - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_without_biases_copies_are_taken_up():
    model = redundant(**NO_BIAS)
    small = apply(model, plan_of(None))
    sequential_sweep(model, small, plan_of(None), [images(model, 12)], TINY_RIDGE)
    x = images(model, 3, seed=7)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("merging", [None, MERGING])
@torch.no_grad()
def test_a_sweep_helps_where_units_are_not_redundant(merging):
    model = make()
    plan = plan_of(merging)
    small = apply(model, plan)
    plain = copy.deepcopy(small)
    x = images(model, 32)
    sequential_sweep(model, small, plan, [x], 1e-3)
    expected = apply(model, plan_of(merging, BlockPlan()))(x)
    error = (small(x) - expected).square().mean()
    assert error < 0.6 * (plain(x) - expected).square().mean()


@torch.no_grad()
def test_merged_tokens_count_as_often_as_their_members():
    """One block, written out."""
    model = make(depth=1)
    plan = Plan(blocks=(HALF.model_copy(update={"num_tokens_out": 4}),), matching="ward")
    small = apply(model, plan)
    host, x = host_of(model), images(model, 16)
    sequential_sweep(model, small, plan, [x], 1e-3)
    found, dense = tensors_of(small), tensors_of(model)

    block = host.block(small, 0)
    state = tokens.start(host.embed(small, x))
    mixed, hidden = Moments.zero(16, x), Moments.zero(NEURONS, x)
    original = model.blocks[0]
    handle = original.attn.proj.register_forward_pre_hook(lambda _, a: mixed.add(a[0]))
    original.attn(original.norm1(state.x))
    handle.remove()
    assert torch.equal(found["out.weight"], compensate_out(dense, HALF, mixed, 1e-3)["out.weight"])
    x_BND = block.attend(state.x)
    state = tokens.merge(state.replace(x_BND), block.norm2(x_BND), 4, 1, "ward")
    mlp = original.mlp
    hidden.add(mlp.act(mlp.fc1(original.norm2(state.x))), state.size)
    expected = compensate_fc2(dense, HALF, hidden, 1e-3)
    torch.testing.assert_close(found["fc2.weight"], expected["fc2.weight"])
    torch.testing.assert_close(found["fc2.bias"], expected["fc2.bias"])


#: The same neurons, and both maps of the MLP factored.
LOW = BlockPlan(neurons=HALF.neurons, ranks=Ranks(fc1=5, fc2=6))


@pytest.mark.parametrize("reads", ["all", "some", "fewer"])
@pytest.mark.parametrize("merging", [None, MERGING])
@torch.no_grad()
def test_maps_that_are_of_low_rank_are_factored_without_loss(merging, reads):
    """Whether fc1 reads all features, some of them, or fewer once it is cut."""
    model, features = make(), tuple(range(0, 16, 2))
    for block in model.blocks:
        block.mlp.fc1.weight.copy_(draw(NEURONS, 5) @ draw(5, 16, seed=1) / 4)
        if reads != "all":
            block.mlp.fc1.weight[:, 1::2] = 0
        block.mlp.fc2.weight.copy_(draw(16, 6, seed=2) @ draw(6, NEURONS, seed=3) / 8)
    if reads == "some":
        model = apply(model, Plan(blocks=(BlockPlan(mlp_features=features),) * 2))
    cut = BlockPlan(ranks=LOW.ranks, mlp_features=features if reads == "fewer" else None)
    plan = plan_of(merging, cut)
    small = apply(model, plan)
    sequential_sweep(model, small, plan, images(model, 12).split(5), 1e-3)
    assert [b.ranks for b in shape_of(small).blocks] == [LOW.ranks] * 2
    x = images(model, 3, seed=7)
    expected = apply(model, plan_of(merging, BlockPlan()))(x)
    assert (small(x) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("merged", [None, 4])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("ranks", [Ranks(fc1=5), Ranks(fc2=6), LOW.ranks])
@torch.no_grad()
def test_what_a_factored_mlp_loses_cannot_be_told_from_its_hidden_activations(
    ranks, biases, merged
):
    """The normal equations, on the tokens that a block gets, as often as they have members."""
    model = make(depth=1, **({} if biases else NO_BIAS))
    cut = LOW.model_copy(update={"ranks": ranks, "num_tokens_out": merged})
    plan = Plan(blocks=(cut,), matching="ward")
    small, x = apply(model, plan), images(model, 16)
    sequential_sweep(model, small, plan, [x], TINY_RIDGE)
    host = host_of(small)
    block, original = host.block(small, 0), model.blocks[0]
    state = tokens.start(host.embed(small, x))
    state = block.attend_and_merge(state, merged or 10, 1, "ward", True)
    size = (torch.ones(16, 10) if state.size is None else state.size).double().flatten()
    read = original.norm2(state.x)
    hidden = block.mlp.act(block.mlp.fc1(read)).flatten(0, 1)
    lost = (original.mlp(read) - block.mlp(read)).flatten(0, 1)
    assert lost.abs().max() > 0.1
    scale = float(original.mlp(read).abs().max())
    if biases:
        assert (size @ lost).abs().max() <= 1e-9 * scale * len(size)
    if ranks.fc2 is None:
        assert (hidden.T @ (size[:, None] * lost)).abs().max() <= 1e-7 * scale * len(size)
        return
    # The factors of fc2 are those of the best map on the same activations.
    whole = Plan(blocks=(cut.model_copy(update={"ranks": Ranks(fc1=ranks.fc1)}),), matching="ward")
    best = apply(model, whole)
    sequential_sweep(model, best, whole, [x], TINY_RIDGE)
    seen = Moments.zero(hidden.shape[1], hidden)
    seen.add(hidden, size)
    second = seen.covariance if biases else seen.second / seen.count
    product = decompose(tensors_of(best)["fc2.weight"], ranks.fc2, moments=second).product
    torch.testing.assert_close(tensors_of(small)["fc2.weight"], product, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_rows_of_factors_count_as_layer_scale_weighs_them():
    """The same function, with layer scale or without, is the same when it is cut."""
    plan = Plan(blocks=(BlockPlan(neurons=tuple(range(0, 64, 2)), ranks=LOW.ranks),) * 2)
    outputs, x = [], images(build(), 8).double()
    for model in (m.double() for m in layer_scaled()):
        small = apply(model, plan)
        sequential_sweep(model, small, plan, [x], 1e-3)
        outputs.append(small(x))
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-6 * outputs[0].abs().max()


def test_later_blocks_are_compensated_on_what_they_really_get():
    """Not on the dense model's activations: the second sweep differs from the first's moments."""
    model = make()
    x = images(model, 32)
    dense = dense_sweep(model, [x])
    small = apply(model, plan_of(None))
    sequential_sweep(model, small, plan_of(None), [x], 1e-3)
    both = [compensate(tensors_of(model, i), HALF, dense[i], 1e-3)["out.weight"] for i in range(2)]
    torch.testing.assert_close(tensors_of(small, 0)["out.weight"], both[0])
    assert not torch.allclose(tensors_of(small, 1)["out.weight"], both[1], rtol=1e-3)


def test_models_and_hooks_stay_as_they_are():
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = apply(model, plan_of(MERGING))
    shape = shape_of(small)
    sequential_sweep(model, small, plan_of(MERGING), [images(model, 8)], 1e-3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert shape_of(small) == shape
    for module in (*model.modules(), *small.modules()):
        assert not module._forward_pre_hooks
    # What was fitted can be trained.
    small(images(model)).sum().backward()
    assert all(p.grad is not None for p in small.blocks.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_mean_outputs_are_matched(name):
    model = build(name, num_heads=HEADS, mlp_ratio=NEURONS / 16).double()
    small = apply(model, Plan(blocks=(HALF,) * 2))
    x = images(model, 12).double()
    before, other = small(x) - model(x), small.get_parameter("norm.weight").clone()
    assert before.mean(0).abs().max() > 1e-3
    match_mean_outputs(model, small, list(x.split(5)))
    after = small(x) - model(x)
    assert after.mean(0).abs().max() < 1e-12
    # Every image is shifted alike, and nothing but the heads changes.
    torch.testing.assert_close(after - before, (-before.mean(0)).expand_as(before))
    assert torch.equal(small.get_parameter("norm.weight"), other)


def test_models_without_a_head_have_no_outputs_to_match():
    model = build(num_classes=0, num_heads=HEADS, mlp_ratio=NEURONS / 16).double()
    small = apply(model, Plan(blocks=(HALF,) * 2))
    before = {k: v.clone() for k, v in small.state_dict().items()}
    match_mean_outputs(model, small, [images(model, 4).double()])
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
