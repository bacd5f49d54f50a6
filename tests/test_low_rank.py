"""Ranks under a budget, and low rank as a method."""

from __future__ import annotations

import copy
import itertools
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vitailor as vt
from conftest import build, images, layer_scaled
from test_compression import same_state
from vitailor.allocate import fill
from vitailor.budget import cost
from vitailor.criteria import magnitude
from vitailor.decompose import Decomposition, decompose
from vitailor.errors import BudgetError, UsageError
from vitailor.factors import weight_of
from vitailor.hosts import host_of, shape_of
from vitailor.methods import VTP, ClosedForm, Hybrid, LowRank, MultiDim
from vitailor.methods.base import Task
from vitailor.methods.low_rank import Projection
from vitailor.orders import plan_for
from vitailor.plan import BlockPlan, Plan
from vitailor.policy import sized
from vitailor.ranks import Spectrum, at_energy, at_share, with_ranks, within_budget
from vitailor.shape import DENSE
from vitailor.sizes import Steps, with_size
from vitailor.surgery import apply, merge_back, written

#: Where projections are that are layers of their own.
PLACES = {"out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def data(model: nn.Module, count: int = 24) -> list[Tensor]:
    return [images(model, count)]


def cut(
    method: LowRank, budget: vt.Budget, model: nn.Module | None = None, **more: Any
) -> nn.Module:
    model = build() if model is None else model
    return vt.compress(model, method, budget, data=data(model), **more)


# -- choosing ranks ------------------------------------------------------------------------------


def spectra(seed: int = 0, names: tuple[str, ...] = ("q", "out", "fc1", "fc2")) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, sizes in enumerate(shape_of(build()).linears()):
        for name in names:
            fan_in, fan_out = sizes[name]
            full = min(fan_in, fan_out)
            values = torch.rand(full, generator=generator).square().sort(descending=True).values
            found.append(Spectrum(i, name, fan_in, fan_out, values))
    return found


def test_ranks_that_save_nothing_are_not_taken():
    square = Spectrum(0, "q", 16, 16, torch.ones(16))
    wide = Spectrum(0, "fc1", 16, 64, torch.ones(16))
    assert (square.most, wide.most) == (7, 12)
    assert at_share([square, wide], 0.5) == [None, 8]
    assert at_share([square, wide], 0.4) == [6, 6]
    assert Spectrum(0, "q", 1, 1, torch.ones(1)).most == 0
    dense = shape_of(build())
    for spectrum in spectra():
        for rank, cheaper in ((spectrum.most, True), (spectrum.most + 1, False)):
            params = cost(with_ranks(dense, [spectrum], [rank]), "params")
            assert (params < dense.params) == cheaper


def test_energy_takes_the_least_rank_that_keeps_it():
    spectrum = Spectrum(0, "fc1", 16, 64, torch.tensor([6.0, 3.0, 1.0] + [0.0] * 13))
    assert at_energy([spectrum], 0.6) == [1]
    assert at_energy([spectrum], 0.61) == [2]
    assert at_energy([spectrum], 0.9) == [2]
    assert at_energy([spectrum], 1.0) == [3]
    assert at_energy([Spectrum(0, "fc1", 16, 64, torch.zeros(16))], 0.9) == [1]


@given(
    st.integers(0, 500), st.sampled_from(["macs", "params"]), st.floats(0.3, 1.0), st.integers(1, 3)
)
def test_budgets_are_met_within_one_step_and_never_exceeded(seed, metric, keep, step):
    dense, found = shape_of(build()), spectra(seed)
    limit = int(keep * cost(dense, metric))
    try:
        choice = within_budget(dense, found, metric, limit, step)
    except BudgetError:
        least = with_ranks(dense, found, [step if s.most >= step else None for s in found])
        assert cost(least, metric) > limit
        return
    spent = cost(with_ranks(dense, found, choice), metric)
    assert spent <= limit
    for i, rank in enumerate(choice):
        if rank is None:
            continue
        more = None if rank + step > found[i].most else rank + step
        bigger = with_ranks(dense, found, [*choice[:i], more, *choice[i + 1 :]])
        assert cost(bigger, metric) > limit or found[i].lost()[rank] == 0


@pytest.mark.parametrize("seed", range(5))
def test_shared_out_ranks_lose_no_more_than_any_others(seed):
    """Against all combinations; filling up leaves a slack of less than a hundredth."""
    dense, found = shape_of(build()), spectra(seed, ("fc1", "fc2"))[:2]
    tables = [[*range(1, s.most + 1), None] for s in found]

    def lost(choice: tuple[int | None, ...]) -> float:
        pairs = zip(found, choice, strict=True)
        return sum(float(s.lost()[rank]) for s, rank in pairs if rank is not None)

    limit = int(0.85 * dense.params)
    ours = within_budget(dense, found, "params", limit)
    fitting = [
        choice
        for choice in itertools.product(*tables)
        if cost(with_ranks(dense, found, list(choice)), "params") <= limit
    ]
    best = min(map(lost, fitting))
    assert lost(tuple(ours)) <= 1.01 * best


# -- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kind", get_args(Decomposition))
def test_a_plain_smaller_model_within_the_budget(kind, aware, tmp_path):
    model = build()
    before = copy.deepcopy(model)
    small = cut(LowRank(decomposition=kind, activation_aware=aware), vt.Budget(params=0.75), model)
    assert same_state(model, before)
    shape = shape_of(small)
    assert 0.7 * shape_of(model).params < shape.params <= 0.75 * shape_of(model).params
    assert shape.params == sum(p.numel() for p in small.parameters())
    assert any(block.ranks != DENSE for block in shape.blocks)
    (step,) = small.vitailor.steps
    assert step.plan.result(shape_of(model)) == shape
    errors = small.vitailor.record["facts"]["errors"]
    for block, own in zip(shape.blocks, errors, strict=True):
        assert set(own) == {name for name, rank in block.ranks if rank is not None}
        # Orthogonal projections lose at most all; LU's are oblique and may do worse.
        most = 3 if kind.startswith("lu") else 1
        assert all(0 <= error < most for error in own.values())
    x = images(model, 3, seed=9)
    vt.save(small, tmp_path / "small")
    assert torch.equal(vt.load(tmp_path / "small")(x), small(x))
    assert torch.allclose(merge_back(small)(x), small(x), atol=1e-5)


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kind", get_args(Decomposition))
def test_what_is_built_is_what_was_asked_for(kind, aware):
    """Weights and recorded errors are those of the decomposition, projection by projection."""
    model = build().double()
    method = LowRank(decomposition=kind, activation_aware=aware, share=0.3)
    small = vt.compress(model, method, vt.Budget(macs=1.0), data=data(model))
    inputs = method.inputs(task_of(model))
    facts = small.vitailor.record["facts"]
    for i, block in enumerate(shape_of(small).blocks):
        tensors, built = (timm_block(m, i) for m in (model, small))
        for name, rank in block.ranks:
            assert (rank is None) is (name in facts["dense"][i])
            if rank is None:
                continue
            weight, moments = weight_of(tensors, name), inputs[i].get(name)
            second = None if moments is None else moments.covariance
            expected = decompose(weight, rank, kind, moments=second)
            torch.testing.assert_close(weight_of(built, name), expected.product)
            factored = small.blocks[i].get_submodule(PLACES.get(name, f"attn.{name}"))
            torch.testing.assert_close(factored.up.weight, expected.up)  # as it was found
            lost = weight - expected.product
            error = (
                lost.norm() / weight.norm()
                if second is None
                else ((lost @ second * lost).sum() / (weight @ second * weight).sum()).sqrt()
            )
            assert facts["errors"][i][name] == pytest.approx(float(error), rel=1e-6)


def test_layer_scale_weighs_what_is_written():
    """As if it were part of the weights."""
    model, folded = layer_scaled()
    x = images(model, 16)
    torch.testing.assert_close(model(x), folded(x), rtol=1e-4, atol=1e-5)
    method = LowRank(projections=("out", "fc2"), share=0.4)
    a, b = (vt.compress(m, method, vt.Budget(macs=1.0), data=[x]) for m in (model, folded))
    torch.testing.assert_close(a(x), b(x), rtol=1e-3, atol=1e-4)


def test_half_precision():
    """Inputs as large as real ones: their squares do not fit in half precision."""
    for dtype in (torch.float16, torch.bfloat16):
        model = build()
        with torch.no_grad():
            model.blocks[0].norm2.weight.fill_(60)
        small = cut(LowRank(), vt.Budget(params=0.75), model.to(dtype))
        errors = small.vitailor.record["facts"]["errors"]
        assert all(0 <= error < 1 for own in errors for error in own.values())


def task_of(model: nn.Module) -> Task:
    return Task(
        model=model,
        shape=shape_of(model),
        budget=vt.Budget(macs=0.9),
        data=vt.data.open_images(data(model), None),
        device=torch.device("cpu"),
        stopwatch=lambda models: [1.0 for _ in models],
        seed=0,
        progress=lambda done, total: None,
    )


def timm_block(model: nn.Module, i: int) -> dict[str, Tensor]:
    host = host_of(model)
    return host.read(host.block(model, i))


def full_rank(model: nn.Module, aware: bool) -> nn.Module:
    """Every projection at its full rank, through the same steps as any rank."""
    shape, task = shape_of(model), task_of(model)
    method = LowRank(activation_aware=aware)
    blocks = tuple(
        BlockPlan(ranks={name: min(sizes) for name, sizes in own.items()})
        for own in shape.linears()
    )
    plan = Plan(blocks=blocks)
    weights, _ = method.decompose(model, plan, method.inputs(task), 0)
    return written(model, plan.result(shape), weights)


@pytest.mark.parametrize("aware", [True, False])
def test_full_rank_is_the_same_function(aware):
    model = build().double()
    x = images(model, 3)
    found = full_rank(model, aware)
    assert all(rank is not None for block in shape_of(found).blocks for _, rank in block.ranks)
    difference = (found(x) - model(x)).norm() / model(x).norm()
    assert difference < 1e-10


def test_activation_aware_is_nearer_on_the_images_it_saw():
    model = build(embed_dim=32, num_heads=4)
    x = images(model, 64)
    losses = []
    for aware in (True, False):
        method = LowRank(activation_aware=aware, share=0.4)
        small = vt.compress(model, method, vt.Budget(macs=1.0), data=[x])
        with torch.no_grad():
            losses.append(float((small(x) - model(x)).square().mean()))
    assert losses[0] < losses[1]


def test_biases_take_up_what_is_lost_of_the_mean():
    """The mean output of every decomposed projection on the calibration images stays as it was."""
    model = build()
    x = images(model, 32)
    means = []
    for name in get_args(Projection):
        method = LowRank(projections=(name,), share=0.3)
        small = vt.compress(model, method, vt.Budget(macs=1.0), data=[x])
        where, part = PLACES.get(name, "attn.qkv"), max(0, "qkv".find(name))
        means = []
        for one in (model, small):
            apart = one is small and where == "attn.qkv"
            out = outputs(one, f"attn.{name}" if apart else where, x)
            parts = 3 if where == "attn.qkv" and not apart else 1
            means.append(out.mean((0, 1)).chunk(parts)[0 if parts == 1 else part])
        assert means[0].abs().max() > 0.01
        torch.testing.assert_close(*means, atol=1e-5, rtol=1e-4)


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a module of the first block puts out."""
    seen: list[Tensor] = []
    module = model.blocks[0].get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("bias", [True, False])
def test_spectra_are_those_of_what_projections_put_out(bias):
    """With a bias, which takes up the mean, those of the outputs' variation; else of the outputs."""
    model = build(proj_bias=bias, qkv_bias=bias).double()
    task = task_of(model)
    x = torch.cat([batch for batch, _ in task.batches()])
    method = LowRank()
    found = method.spectra(model, method.inputs(task))
    for name, where in (("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), ("out", "attn.proj")):
        out = outputs(model, where, x).flatten(0, 1)
        out = out - out.mean(0) if bias else out
        expected = torch.linalg.eigvalsh(out.mT @ out / len(out)).flip(0)
        (ours,) = (s.energies for s in found if s.block == 0 and s.name == name)
        torch.testing.assert_close(ours, expected[: len(ours)], rtol=1e-6, atol=1e-9)


def test_spectra_of_what_is_written_are_weighed_by_layer_scale():
    model, folded = (m.double() for m in layer_scaled())
    for aware in (True, False):
        method = LowRank(projections=("fc2",), activation_aware=aware)
        # Of the first block, whose inputs are the same.
        a, b = (method.spectra(m, method.inputs(task_of(m)))[0].energies for m in (model, folded))
        torch.testing.assert_close(a, b)


def test_rows_that_layer_scale_leaves_out_come_to_no_harm():
    model = build(init_values=1.0)
    with torch.no_grad():
        model.blocks[0].ls2.gamma[:5] = 0
        model.blocks[1].ls1.gamma.zero_()
    small = cut(LowRank(), vt.Budget(params=0.7), model)
    assert torch.isfinite(small(images(model, 3))).all()


def test_settings_of_ranks_and_sketches():
    model = build()
    for step in (3, 4):
        small = cut(LowRank(step=step), vt.Budget(params=0.7), model)
        ranks = [r for block in shape_of(small).blocks for _, r in block.ranks if r is not None]
        assert ranks
        assert all(rank % step == 0 for rank in ranks)
    task, method = task_of(model), LowRank(energy=0.7)
    kept = at_energy(method.spectra(model, method.inputs(task)), 0.7)
    expected = with_ranks(task.shape, method.spectra(model, method.inputs(task)), kept)
    assert shape_of(cut(method, vt.Budget(macs=1.0), model)) == expected
    wide = build(embed_dim=64)  # a sketch of few columns is not all there is
    sketched = LowRank(decomposition="randomized-svd", share=0.05)
    one, same, other = (cut(sketched, vt.Budget(macs=1.0), wide, seed=seed) for seed in (0, 0, 1))
    assert same_state(one, same)
    assert not same_state(one, other)


@pytest.mark.parametrize("method", [LowRank(), Hybrid(form="factors")])
def test_budgets_of_models_that_are_cut_already(method):
    """With fewer tokens, hidden units and features read, MACs are those of what is left."""
    kept = tuple(range(11))
    block = BlockPlan(num_tokens_out=5, neurons=tuple(range(40)), mlp_features=kept)
    before = apply(build(), Plan(blocks=(block, BlockPlan(neurons=tuple(range(50))))))
    for budget in (vt.Budget(macs=0.8), vt.Budget(params=0.8)):
        small = vt.compress(before, method, budget, data=data(before))
        metric = budget.metric
        share = cost(shape_of(small), metric) / cost(shape_of(before), metric)
        assert 0.78 < share <= 0.8
        assert shape_of(small).blocks[0].mlp_features == 11


def test_values_that_are_not_finite_are_told_of():
    model = build()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    for aware in (True, False):
        with pytest.raises(UsageError, match="not finite"):
            cut(LowRank(activation_aware=aware), vt.Budget(params=0.8), model)


@pytest.mark.parametrize(
    "method",
    [
        ClosedForm(harm_images=8, tune_images=8),
        ClosedForm(allocation="uniform"),
        MultiDim(trials=3, initial=2),
        VTP(scores="magnitude", training=vt.TrainConfig(epochs=1, batch_size=8, hflip=0.0)),
    ],
)
def test_low_rank_models_are_cut_again(method):
    model = build(embed_dim=32)
    low = cut(LowRank(), vt.Budget(params=0.7), model)
    train = [(images(model, 16), torch.arange(16) % 5)] if method.trains else None
    small = vt.compress(low, method, vt.Budget(macs=0.5), data=data(model), train=train)
    shape = shape_of(small)
    assert shape == small.vitailor.shape
    assert 0.44 < shape.macs / shape_of(low).macs <= 0.5
    for block, sizes in zip(shape.blocks, shape.linears(), strict=True):
        for name, rank in block.ranks:
            fan_in, fan_out = sizes[name]
            assert rank is None or rank * (fan_in + fan_out) < fan_in * fan_out
    assert torch.isfinite(small(images(model, 3))).all()


def test_factors_come_back_with_what_is_given_back():
    """An allocation that shrinks and grows ends at the factors of the model it cuts."""
    low = shape_of(cut(LowRank(), vt.Budget(params=0.7), build(embed_dim=32)))
    steps, least = Steps.for_shape(low), low
    for i in range(low.depth):
        least = with_size(least, i, "neurons", steps.neurons)
    assert all(block.ranks.fc1 is block.ranks.fc2 is None for block in least.blocks)
    assert sized(low, {"mlp_dim": [steps.neurons] * low.depth}) == least
    assert fill(least, low, "params", low.params, ("neurons",), steps) == low


def test_factors_that_stay_are_not_asked_for():
    """A plan that cuts nothing touches nothing, factors neither."""
    low = cut(LowRank(), vt.Budget(params=0.7))
    orders = [magnitude(timm_block(low, i)).order() for i in range(2)]
    assert plan_for(shape_of(low), shape_of(low), orders) == Plan.identity(shape_of(low))


def test_multiplied_out_models_tell_of_themselves(tmp_path):
    small = cut(LowRank(), vt.Budget(params=0.75))
    back = merge_back(small)
    shape = shape_of(back)
    known, before = back.vitailor, small.vitailor
    assert known.shape == shape != before.shape
    assert known.record["params"] == {**before.record["params"], "after": shape.params}
    assert known.record["macs"] == {**before.record["macs"], "after": shape.macs}
    assert (known.steps, known.preprocessing) == (before.steps, before.preprocessing)
    vt.save(back, tmp_path / "back")
    assert vt.load(tmp_path / "back").vitailor.shape.params == shape.params
    assert small.vitailor == before


def test_after_vtp():
    model = build()
    training = vt.TrainConfig(epochs=1, batch_size=8, hflip=0.0)
    train = [(images(model, 16), torch.arange(16) % 5)]
    pruned = vt.compress(model, VTP(training=training), vt.Budget(params=0.8), train=train)
    small = cut(LowRank(decomposition="qr-importance"), vt.Budget(params=0.8), pruned)
    assert [step.method for step in small.vitailor.steps] == ["vtp", "low-rank"]
    assert shape_of(small).params <= 0.8 * shape_of(pruned).params
    assert [b.mlp_features for b in shape_of(small).blocks] == [
        b.mlp_features for b in shape_of(pruned).blocks
    ]


def test_low_rank_models_train(tmp_path):
    model = build()
    small = cut(LowRank(), vt.Budget(params=0.75), model)
    config = vt.TrainConfig(epochs=2, batch_size=8, lr=1e-3, hflip=0.0, distill="soft")
    tuned = vt.train(small, data(model), config, teacher=model)
    losses = tuned.vitailor.record["training"]["losses"]
    assert losses[1] < losses[0]
    assert shape_of(tuned) == shape_of(small)


def test_what_cannot_work_is_refused():
    model = build()
    for settings, budget, error, message in (
        ({"share": 0.5, "energy": 0.9}, 0.8, UsageError, "Both share and energy"),
        ({}, 0.05, BudgetError, "out of reach"),
        ({"share": 0.9, "projections": ("q",)}, 0.5, BudgetError, "over the budget"),
    ):
        with pytest.raises(error, match=message):
            cut(LowRank(**settings), vt.Budget(params=budget), model)
    with pytest.raises(UsageError, match="share fixes the sizes"):
        vt.compress(model, LowRank(share=0.5), vt.Budget(latency=0.5), data=data(model))
    with pytest.raises(UsageError, match="calibration images"):
        vt.compress(model, LowRank(), vt.Budget(params=0.8))
    plain = vt.compress(model, LowRank(activation_aware=False), vt.Budget(params=0.8))
    assert shape_of(plain).params <= 0.8 * shape_of(model).params
    once = cut(LowRank(), vt.Budget(params=0.8), model)
    with pytest.raises(UsageError, match="merge_back"):
        cut(LowRank(), vt.Budget(params=0.8), once)
    assert same_state(cut(LowRank(), vt.Budget(params=1.0), model), model)
