"""`compress`: every method and baseline keeps the promises."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitailor as vt
from conftest import build, images
from test_allocate import bigger
from vitailor.benchmarking import bench
from vitailor.budget import cost
from vitailor.compression import plan_only
from vitailor.errors import BudgetError, DataError, UnsupportedModelError, UsageError
from vitailor.hosts import shape_of
from vitailor.methods import ClosedForm, Method, TokenMerge
from vitailor.plan import Plan
from vitailor.sizes import DIMENSIONS, FIELDS, Steps

FEW = {"harm_images": 8, "tune_images": 8}
#: The default, every baseline, and every setting that takes another way.
METHODS: dict[str, Method] = {
    "default": ClosedForm(**FEW),
    "single harms": ClosedForm(harm_images=8, tune_images=0),
    "magnitude": ClosedForm(criterion="magnitude", compensation=False, allocation="uniform"),
    "variance": ClosedForm(criterion="variance", allocation="uniform"),
    "taylor": ClosedForm(criterion="taylor", compensation=False, allocation="uniform"),
    "taylor, labels": ClosedForm(criterion="taylor", taylor_labels="given", **FEW),
    "uncompensated": ClosedForm(compensation=False, harm_images=8, tune_images=0),
    "bare": ClosedForm(criterion="magnitude", compensation=False, harm_images=8, tune_images=0),
    "cosine": ClosedForm(matching="cosine", harm_images=8, tune_images=0),
    "refined": ClosedForm(refine=2, harm_images=8, tune_images=0),
    "multi-dim": vt.MultiDim(trials=3, stages=1),
    "multi-dim, merging": vt.MultiDim(trials=2, stages=1, tokens="ward", criterion="output_error"),
    "token-merge": TokenMerge(),
    "token-merge, ward": TokenMerge(matching="ward"),
}


def make(name: str = "vit_tiny_patch16_224", **overrides: Any) -> nn.Module:
    return build(name, num_heads=4, **overrides)


def data(model: nn.Module, count: int = 24) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, count), torch.arange(count) % 5)]


def small_of(key: str, budget: vt.Budget, model: nn.Module | None = None, **more: Any) -> nn.Module:
    model = make() if model is None else model
    return vt.compress(model, METHODS[key], budget, data=data(model), **more)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def dimensions_of(method: Method, model: nn.Module) -> tuple[str, ...]:
    shape = shape_of(model)
    if isinstance(method, vt.MultiDim):
        return method.dimensions
    budget = vt.Budget(macs=0.7)
    return method._dimensions(shape, budget) if isinstance(method, ClosedForm) else ("tokens",)


# -- promises of every method --------------------------------------------------------------------


@pytest.mark.parametrize("key", METHODS)
def test_a_plain_smaller_model_within_the_budget(key, tmp_path):
    model = make()
    before = shape_of(model)
    small = small_of(key, vt.Budget(macs=0.7), model, seed=3, source="mine")
    after = shape_of(small)
    assert type(small) is type(model)
    assert not any(module.training for module in small.modules())
    assert after.params == sum(p.numel() for p in small.parameters())
    assert cost(after, "macs") <= 0.7 * before.macs
    # Met within one unit of what may be cut.
    steps = Steps.for_shape(before)
    for grown in bigger(after, before, dimensions_of(METHODS[key], model), steps):
        assert not after.macs < grown.macs <= 0.7 * before.macs

    known = small.vitailor
    assert known.shape == after
    (step,) = known.steps
    assert (step.source, step.method, step.seed) == ("mine", METHODS[key].name, 3)
    assert step.budget == "macs 0.7"
    assert step.settings == METHODS[key].model_dump(mode="json", exclude={"storage"})
    assert set(step.versions) == {"vitailor", "torch", "timm", "python"}
    assert step.plan.result(before) == after
    record = known.record
    assert record["macs"] == {"before": before.macs, "after": after.macs}
    assert record["params"] == {"before": before.params, "after": after.params}
    assert record["calibration"]["images"] == 24
    assert known.preprocessing.input_size == (3, 24, 24)

    x = images(model, 3, seed=9)
    expected = small(x)
    assert torch.isfinite(expected).all()
    vt.save(small, tmp_path / "small")
    loaded = vt.load(tmp_path / "small")
    assert torch.equal(loaded(x), expected)
    assert loaded.vitailor.shape == known.shape
    assert loaded.vitailor.steps == known.steps


@pytest.mark.parametrize("key", METHODS)
def test_the_input_and_the_world_stay_as_they_are(key):
    model = make()
    model.blocks[0].train()
    model.head.weight.requires_grad_(False)
    untouched = copy.deepcopy(model)
    training = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    small_of(key, vt.Budget(macs=0.8), model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert same_state(model, untouched)
    assert [module.training for module in model.modules()] == training
    assert not model.head.weight.requires_grad
    assert not hasattr(model, "vitailor")
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_in_training_is_compressed_as_in_evaluation():
    model = make(drop_path_rate=0.5, proj_drop_rate=0.5)
    expected = small_of("default", vt.Budget(macs=0.7), model)
    model.train()
    small = small_of("default", vt.Budget(macs=0.7), model)
    assert model.training
    assert same_state(small, expected)
    assert not small.training


@pytest.mark.parametrize("key", ["default", "taylor, labels", "refined", "token-merge"])
def test_the_same_seed_gives_the_same_model(key):
    torch.manual_seed(1)
    one = small_of(key, vt.Budget(macs=0.7), seed=5)
    torch.manual_seed(2)
    two = small_of(key, vt.Budget(macs=0.7), seed=5)
    assert one.vitailor.steps == two.vitailor.steps
    assert same_state(one, two)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("budget", [vt.Budget(macs=1.0), vt.Budget(macs=10**12)])
def test_what_is_within_the_budget_stays_as_it_is(key, budget):
    model = make()
    small = small_of(key, budget, model)
    x = images(model, 3)
    assert torch.equal(small(x), model(x))
    assert same_state(small, model)
    assert small is not model
    assert small.head.weight.data_ptr() != model.head.weight.data_ptr()
    assert shape_of(small) == shape_of(model) == small.vitailor.shape
    assert small.vitailor.steps[0].plan == Plan.identity(shape_of(model))


@pytest.mark.parametrize("key", ["default", "single harms", "magnitude", "variance"])
@pytest.mark.parametrize("limit", [0.6, 6000])
def test_parameters(key, limit):
    model = make()
    small = small_of(key, vt.Budget(params=limit), model)
    allowed = limit if isinstance(limit, int) else limit * shape_of(model).params
    assert 0.9 * allowed < sum(p.numel() for p in small.parameters()) <= allowed
    assert not shape_of(small).merges_tokens  # which have no parameters


@pytest.mark.parametrize("budget", [vt.Budget(latency=1.0), vt.Budget(latency_ms=10**6)])
@pytest.mark.parametrize(
    "method",
    [
        ClosedForm(harm_images=8, tune_images=0),
        METHODS["magnitude"],
        TokenMerge(),
        vt.LowRank(),
        vt.Hybrid(),
        vt.Hybrid(form="factors"),
    ],
    ids=lambda method: f"{method.name} {getattr(method, 'form', '')}",
)
def test_what_is_fast_enough_stays_as_it_is(method, budget, monkeypatch):
    monkeypatch.setattr("vitailor.tasks._stopwatch", lambda models, device: [1.0] * len(models))
    model = make()
    small = vt.compress(model, method, budget, data=data(model))
    x = images(model, 3)
    assert shape_of(small) == shape_of(model)
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert small.vitailor.steps[0].plan == Plan.identity(shape_of(model))


def test_latencies_are_of_the_model_s_precision(monkeypatch):
    told: list[str] = []

    def listening(models: Any, *, dtype: str, **more: Any) -> Any:
        told.append(dtype)
        return bench(models, dtype=dtype, **(more | {"runs": 1, "warmup": 0}))

    monkeypatch.setattr("vitailor.tasks.bench", listening)
    for dtype in (torch.bfloat16, torch.float64):
        vt.compress(make().to(dtype), TokenMerge(), vt.Budget(latency_ms=10**6))
    assert set(told[: len(told) // 2]) == {"bfloat16"}
    assert set(told[len(told) // 2 :]) == {"float32"}  # the nearest that is timed


def test_smaller_budgets_give_smaller_models():
    costs = [
        shape_of(small_of("single harms", vt.Budget(macs=k))).macs for k in (0.35, 0.5, 0.7, 0.9)
    ]
    assert all(a < b for a, b in pairwise(costs))


@pytest.mark.parametrize("key", ["default", "token-merge"])
def test_latency(key):
    """The clock of a busy machine may say anything, but never that a larger model is the answer."""
    model = make()
    method = TokenMerge() if key == "token-merge" else METHODS["single harms"]
    try:
        small = vt.compress(model, method, vt.Budget(latency=0.95), data=data(model))
    except BudgetError as error:
        assert "dense model takes" in str(error)  # noqa: PT017
    else:
        assert shape_of(small).macs < shape_of(model).macs
        assert small.vitailor.steps[0].budget == "latency 0.95"
        assert all(small.vitailor.record["latency_ms"][when] > 0 for when in ("before", "after"))


@pytest.mark.parametrize("key", ["default", "bare", "token-merge"])
def test_a_plan_alone_is_the_one_that_is_carried_out(key):
    model = make()
    shape = plan_only(model, METHODS[key], vt.Budget(macs=0.7), data=data(model))
    assert shape == shape_of(small_of(key, vt.Budget(macs=0.7), model))


# -- families, dimensions, precisions ------------------------------------------------------------

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_tiny_patch16_224", {"qk_norm": True}),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    ("vit_tiny_patch16_224", {"num_classes": 0}),
]


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_families(name, overrides, tmp_path):
    model = make(name, **overrides)
    small = small_of("single harms", vt.Budget(macs=0.6), model)
    shape = shape_of(small)
    assert shape.macs <= 0.6 * shape_of(model).macs
    if shape.qk_norm:
        assert all(b.qk_dim == 4 for b in shape.blocks)
    prefix = shape.num_prefix_tokens
    assert all(b.num_tokens_out > prefix for b in shape.blocks)
    vt.save(small, tmp_path / "small")
    x = images(model)
    assert torch.equal(vt.load(tmp_path / "small")(x), small(x))


@pytest.mark.parametrize("allocation", ["marginal", "uniform"])
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_only_the_dimensions_allowed_are_cut(allocation, dimension):
    model = make()
    method = ClosedForm(
        dimensions=(dimension,), allocation=allocation, harm_images=8, tune_images=0
    )
    keep = 0.95 if dimension in ("qk", "v") else 0.8
    small = vt.compress(model, method, vt.Budget(macs=keep), data=data(model))
    for now, before in zip(shape_of(small).blocks, shape_of(model).blocks, strict=True):
        for other in DIMENSIONS:
            if other != dimension:
                assert getattr(now, FIELDS[other]) == getattr(before, FIELDS[other])
    assert shape_of(small).macs < shape_of(model).macs


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_tokens_that_nothing_reads_are_not_paired(pool):
    model = make(global_pool=pool, class_token=pool == "token")
    method = ClosedForm(dimensions=("tokens",), allocation="uniform")
    small = vt.compress(model, method, vt.Budget(macs=0.8), data=data(model))
    first, last = shape_of(small).blocks[0], shape_of(small).blocks[-1]
    assert last.num_tokens_out < last.num_tokens_in
    assert not first.fuses
    assert last.fuses == (pool == "token")
    paired = copy.deepcopy(small)
    paired.blocks.block(-1).fuses = False
    x = images(model)
    with torch.inference_mode():
        assert torch.equal(small(x), paired(x))
    assert shape_of(small).macs <= shape_of(paired).macs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    """Images come in float32 and are cast."""
    model = make().to(dtype)
    x = [(images(model, 24).float(), torch.arange(24) % 5)]
    for key in ("default", "taylor", "refined"):
        small = vt.compress(model, METHODS[key], vt.Budget(macs=0.7), data=x)
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert torch.isfinite(small(images(model))).all()


def test_compensation_and_allocation_help():
    """On the calibration images, at the outputs, against cutting everywhere alike."""
    model = make()
    x = images(model, 24)
    with torch.no_grad():
        truth = model(x).log_softmax(-1)
        lost = {
            key: float((truth.exp() * (truth - small_of(key, vt.Budget(macs=0.6), model)(x).log_softmax(-1))).sum())
            for key in ("default", "magnitude")
        }  # fmt: skip
    assert lost["default"] < 0.5 * lost["magnitude"]


def test_refinement_is_recorded():
    facts = small_of("refined", vt.Budget(macs=0.7)).vitailor.record["facts"]
    assert facts["refine"]["epochs"] == 2
    assert facts["refine"]["last_loss"] > 0
    assert facts["harm_evaluations"] > 0


def test_a_frozen_model_is_refined_and_stays_frozen():
    model = make().requires_grad_(False)
    small = small_of("refined", vt.Budget(macs=0.7), model)
    assert small.vitailor.record["facts"]["refine"]["last_loss"] > 0
    assert not any(p.requires_grad for p in (*small.parameters(), *model.parameters()))


def test_a_head_in_another_s_place_is_what_counts(tmp_path):
    model = make()
    model.head = nn.Linear(model.embed_dim, 3)
    assert shape_of(model).num_classes == 3
    small = vt.compress(model, TokenMerge(), vt.Budget(macs=0.8))
    vt.save(small, tmp_path / "out")
    x = images(model)
    assert torch.equal(vt.load(tmp_path / "out")(x), small(x))
    assert small(x).shape == (2, 3)


# -- what a compressed model can go on to do -----------------------------------------------------


def test_provenance_survives_copies_and_training(tmp_path):
    small = small_of("default", vt.Budget(macs=0.6))
    twin = copy.deepcopy(small)
    assert twin.vitailor == small.vitailor
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(images(twin)).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    optimizer.step()
    assert not same_state(twin, small)
    assert twin.vitailor == small.vitailor
    vt.save(twin.eval(), tmp_path / "trained")
    loaded = vt.load(tmp_path / "trained")
    assert torch.equal(loaded(images(twin)), twin(images(twin)))
    assert loaded.vitailor.steps == small.vitailor.steps


def test_provenance_is_read_only():
    known = small_of("token-merge", vt.Budget(macs=0.7)).vitailor
    with pytest.raises(ValueError, match="frozen"):
        known.steps = ()


@pytest.mark.parametrize("first", ["single harms", "token-merge"])
@pytest.mark.parametrize("second", ["default", "magnitude", "token-merge, ward"])
def test_an_artifact_can_be_compressed_again(first, second, tmp_path):
    vt.save(small_of(first, vt.Budget(macs=0.9)), tmp_path / "once")
    once = vt.load(tmp_path / "once")
    before = shape_of(once)
    twice = small_of(second, vt.Budget(macs=0.85), once)
    after = shape_of(twice)
    steps = twice.vitailor.steps
    assert [step.method for step in steps] == [METHODS[k].name for k in (first, second)]
    assert steps[0] == once.vitailor.steps[0]
    assert steps[1].plan.result(before) == after == twice.vitailor.shape
    assert 0.75 * before.macs < after.macs <= 0.85 * before.macs
    for now, then in zip(after.blocks, before.blocks, strict=True):
        assert all(getattr(now, f) <= getattr(then, f) for f in FIELDS.values())
    if first == "token-merge":  # tokens that are merged already are paired as they were
        assert after.matching == before.matching == "cosine"
    vt.save(twice, tmp_path / "twice")
    assert torch.equal(vt.load(tmp_path / "twice")(images(once)), twice(images(once)))


def test_an_artifact_within_the_budget_stays_as_it_is():
    once = small_of("token-merge", vt.Budget(macs=0.75))
    x = images(once)
    for key in ("default", "token-merge, ward"):
        twice = small_of(key, vt.Budget(macs=1.0), once)
        assert torch.equal(twice(x), once(x))
        assert len(twice.vitailor.steps) == 2


def test_class_names_are_passed_on():
    once = small_of("token-merge", vt.Budget(macs=0.8))
    names = ("ant", "bee", "cat", "dog", "eel")
    once.vitailor = once.vitailor.model_copy(update={"class_names": names})
    assert small_of("token-merge", vt.Budget(macs=0.9), once).vitailor.class_names == names


def test_accuracy_before_and_after():
    model = make()
    labeled = data(model, 30)
    small = small_of("default", vt.Budget(macs=0.6), model, evaluate=labeled)
    record = small.vitailor.record
    for name, one in (("before", model), ("after", small)):
        assert record["top1"][name] == pytest.approx(vt.evaluate(one, labeled).top1)
    low, high = record["top1"]["interval"]
    assert low <= record["top1"]["after"] - record["top1"]["before"] <= high
    assert record["images"] == 30


def test_an_accuracy_that_is_known_is_not_measured_again(monkeypatch):
    model = make()
    test = data(model)
    known = vt.evaluate(model, test)
    measured: list[nn.Module] = []

    def listening(one: nn.Module, images: Any) -> Any:
        measured.append(one)
        return vt.evaluate(one, images)

    monkeypatch.setattr("vitailor.compression.measure_accuracy", listening)
    small = vt.compress(model, TokenMerge(), vt.Budget(macs=0.8), evaluate=test, before=known)
    assert len(measured) == 1
    assert small.vitailor.record["top1"]["before"] == known.top1
    refused(UsageError, "not on the images", evaluate=data(model, 12), before=known)
    refused(UsageError, "not on the images", before=known)


def test_progress_reaches_its_total():
    seen: list[tuple[int, int]] = []
    small_of(
        "refined", vt.Budget(macs=0.7), progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {5}
    assert seen[-1] == (5, 5)


# -- what is refused, and when -------------------------------------------------------------------


class Unworkable(ClosedForm):
    """Fails where the work would start."""

    def run(self, task: Any) -> Any:
        raise AssertionError("work has started")


def refused(error: type[Exception], match: str, **arguments: Any) -> None:
    model = arguments.pop("model", None) or make()
    given = {"method": Unworkable(), "budget": vt.Budget(macs=0.7), "data": data(make())}
    given |= arguments
    method, budget = given.pop("method"), given.pop("budget")
    with pytest.raises(error, match=match):
        vt.compress(model, method, budget, **given)


def test_an_image_that_cannot_be_read_loses_nothing(tmp_path):
    for i in range(4):
        (tmp_path / f"c{i}").mkdir()
        Image.new("RGB", (24, 24), (50 * i, 90, 10)).save(tmp_path / f"c{i}" / "a.png")
    (tmp_path / "c3" / "b.png").write_bytes(b"no image")
    classes = tmp_path / "map"
    classes.write_text("c0\nc1\nc2\nc3\nc4")
    refused(DataError, "b.png", evaluate=tmp_path, class_map=classes)


def test_refusals_come_before_any_work(tmp_path):
    unlabeled = [images(make(), 8)]
    given_labels = Unworkable(criterion="taylor", taylor_labels="given")
    with pytest.raises(AssertionError, match="work has started"):
        vt.compress(make(), Unworkable(), vt.Budget(macs=0.7), data=unlabeled)
    refused(UsageError, "needs calibration images", data=None)
    refused(UsageError, "negative", seed=-1)
    refused(DataError, "no images", data=[])
    refused(DataError, "nowhere", data=str(tmp_path / "nowhere"))
    refused(DataError, "needs labels", data=unlabeled, method=given_labels)
    refused(DataError, "has no labels", evaluate=unlabeled)
    refused(DataError, "label 7", evaluate=[(images(make(), 2), torch.tensor([7, 0]))])
    refused(UnsupportedModelError, "Linear", model=nn.Linear(3, 3), data=unlabeled)
    refused(BudgetError, "No plan meets 10 macs", budget=vt.Budget(macs=10))
    refused(BudgetError, "No plan meets 10 params", budget=vt.Budget(params=10))
    tokens = Unworkable(dimensions=("tokens",))
    refused(UsageError, "no parameters", budget=vt.Budget(params=0.5), method=tokens)
    normed = make(qk_norm=True)
    refused(UsageError, "normalises", model=normed, method=Unworkable(dimensions=("qk",)))


@pytest.mark.parametrize(
    ("budget", "error", "match"),
    [
        (vt.Budget(params=0.9), UsageError, "no parameters"),
        (vt.Budget(macs=10), BudgetError, "No plan meets 10 macs"),
    ],
)
def test_token_merging_refuses_at_once(budget, error, match, monkeypatch):
    monkeypatch.setattr(TokenMerge, "run", Unworkable.run)
    with pytest.raises(error, match=match):
        vt.compress(make(), TokenMerge(), budget)


def test_merging_tokens_needs_no_images():
    small = vt.compress(make(), TokenMerge(), vt.Budget(macs=0.7))
    assert small.vitailor.record["calibration"] == {"images": 0}


def test_an_unlabeled_classless_model_takes_images_of_any_kind():
    model = make(num_classes=0)
    small = vt.compress(model, METHODS["default"], vt.Budget(macs=0.8), data=images(model, 8))
    assert shape_of(small).macs <= 0.8 * shape_of(model).macs


def test_of_a_folder_few_images_are_drawn_and_of_anything_else_all_are_taken():
    def seen(data: Any, **more: Any) -> int:
        small = vt.compress(model, TokenMerge(), vt.Budget(macs=0.8), data=data, **more)
        return small.vitailor.record["calibration"]["images"]

    model = make()
    assert seen("digits:train") == 512
    assert seen("digits:train", images=40) == 40
    assert seen([torch.randn(3, 32, 32) for _ in range(600)]) == 600
    with pytest.raises(DataError, match="600"):
        seen(data(model), images=600)


def test_a_plan_over_the_budget_is_refused_before_anything_is_built():
    """As its compression would be."""
    model = make()
    fixed = vt.LowRank(share=0.95, activation_aware=False)
    for verb in (plan_only, vt.compress):
        with pytest.raises(BudgetError, match="over the budget"):
            verb(model, fixed, vt.Budget(macs=0.5))


def test_a_compressed_model_is_traced_whole():
    """`torch.export` gives a program that needs nothing of vitailor."""
    model = make()
    small = small_of("default", vt.Budget(macs=0.6), model)
    assert shape_of(small).merges_tokens
    x = images(model, 2)
    program = torch.export.export(small, (x,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), small(x), rtol=1e-5, atol=1e-6)
