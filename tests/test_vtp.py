"""Vision Transformer Pruning as a method: stages, budgets, baselines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitailor as vt
from conftest import build, images
from test_compression import same_state
from vitailor.compression import plan_only
from vitailor.errors import BudgetError, DataError, UsageError
from vitailor.gates import fold_gates, insert_gates, remove_gates
from vitailor.hosts import shape_of
from vitailor.methods import VTP
from vitailor.surgery import apply
from vitailor.training import Event

SHORT = vt.TrainConfig(epochs=2, batch_size=8, lr=1e-3, gate_lr=2e-2, hflip=0.0, checkpoint_every=1)
BUDGET = vt.Budget(macs=0.7)
METHODS = {
    "inputs": VTP(training=SHORT),
    "outputs": VTP(training=SHORT, placement="outputs"),
    "hard, by layer": VTP(training=SHORT, harden=True, scope="layer"),
    "proximal, by kind": VTP(training=SHORT, proximal=True, scope="kind", l1=0.1),
    "magnitude": VTP(training=SHORT, scores="magnitude", scope="layer"),
    "distilled": VTP(training=SHORT.model_copy(update={"distill": "soft"}), sparse_epochs=1),
}


def data(model: nn.Module, count: int = 24) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, count), torch.arange(count) % 5)]


def prune(method: VTP, model: nn.Module | None = None, budget=BUDGET, **more: Any) -> nn.Module:
    model = build() if model is None else model
    return vt.compress(model, method, budget, train=data(model), **more)


@pytest.mark.parametrize("key", METHODS)
def test_a_plain_smaller_model_within_the_budget(key, tmp_path):
    model = build()
    before, weights, random = shape_of(model), copy.deepcopy(model), torch.get_rng_state()
    small = prune(METHODS[key], model)
    assert torch.equal(torch.get_rng_state(), random)
    assert same_state(model, weights)
    after = shape_of(small)
    assert type(small) is type(model)
    assert 0.6 * before.macs < after.macs <= 0.7 * before.macs
    assert after.params == sum(p.numel() for p in small.parameters())
    known = small.vitailor
    (step,) = known.steps
    assert (step.method, step.settings) == ("vtp", METHODS[key].model_dump(mode="json"))
    assert step.plan.result(before) == after
    assert known.record["training"]["images"] == 24
    facts = known.record["facts"]
    gated = (
        ("dims", "neurons")
        if key == "outputs"
        else ("attn_features", "v", "mlp_features", "neurons")
    )
    assert tuple(facts["kept"]) == gated
    assert len(facts["finetune"]["losses"]) == 2
    assert ("gate_quantiles" in facts) == (key != "magnitude")
    x = images(model, 3, seed=9)
    vt.save(small, tmp_path / "small")
    assert torch.equal(vt.load(tmp_path / "small")(x), small(x))


def test_stages_one_by_one_are_the_whole(tmp_path):
    whole = prune(VTP(training=SHORT))
    for stage in ("sparse", "prune", "finetune"):
        part = VTP(training=SHORT, stage=stage)
        last = prune(part, folder=tmp_path, resume=stage != "sparse")
        if stage == "sparse":
            assert shape_of(last) == shape_of(build())
            assert not same_state(last, build())
        if stage == "prune":
            assert shape_of(last) == shape_of(whole)
            assert not same_state(last, whole)
            assert "finetune" not in last.vitailor.record["facts"]
    assert same_state(last, whole)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["sparse training", "fine-tuning"])
def test_interrupted_and_resumed_is_the_whole(where, tmp_path):
    whole = prune(VTP(training=SHORT))

    def interrupt(stage: str, event: Event) -> None:
        if stage == where and (event.epoch, event.update) == (2, 2):
            raise Stop

    with pytest.raises(Stop):
        prune(VTP(training=SHORT), folder=tmp_path, on_event=interrupt)
    assert same_state(prune(VTP(training=SHORT), folder=tmp_path, resume=True), whole)
    other = build(seed=5)
    with pytest.raises(UsageError, match="made with another model"):
        prune(VTP(training=SHORT), other, folder=tmp_path, resume=True)
    outputs = VTP(training=SHORT, placement="outputs")
    with pytest.raises(UsageError, match="made with another placement"):
        prune(outputs, folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match="made with another l1"):
        prune(VTP(training=SHORT, l1=0.5), folder=tmp_path, resume=True)


def test_sparse_training_makes_gates_small_and_tells_of_it():
    told: list[dict[str, float]] = []
    for strength in (0.0, 0.1):
        found: list[Event] = []
        method = VTP(training=SHORT, l1=strength, stage="sparse")
        prune(method, on_event=lambda stage, event, into=found: into.append(event))
        told.append([event for event in found if event.observed][-1].observed)
    assert told[1]["threshold"] < told[0]["threshold"] - 0.02
    assert all(0.1 < seen["pruned"] < 0.9 for seen in told)


def test_sparse_training_may_have_its_own_learning_rate():
    rates: dict[str, list[float]] = {}

    epochs: dict[str, int] = {}

    def listen(stage: str, event: Event) -> None:
        rates.setdefault(stage, []).append(event.lr)
        epochs[stage] = event.epoch

    slow = VTP(training=SHORT, sparse_lr=1e-5, sparse_epochs=1)
    prune(slow, on_event=listen)
    assert max(rates["sparse training"]) == pytest.approx(1e-5)
    assert max(rates["fine-tuning"]) == pytest.approx(SHORT.lr)
    assert epochs == {"sparse training": 1, "fine-tuning": SHORT.epochs}


def test_bad_input_leaves_checkpoints_and_a_fresh_start_does_not(tmp_path):
    method = VTP(training=SHORT, stage="sparse")
    prune(method, folder=tmp_path)
    last = tmp_path / "sparse" / "last.pt"
    before = last.read_bytes()
    with pytest.raises(UsageError, match="does not search"):
        prune(method, folder=tmp_path, reward=data(build()))
    assert last.read_bytes() == before
    stale = tmp_path / "finetune" / "last.pt"
    stale.parent.mkdir()
    stale.write_bytes(before)
    prune(method, folder=tmp_path)
    assert not stale.exists()


def test_a_proximal_step_makes_gates_zero_and_a_penalty_does_not():
    for proximal, zero in ((True, True), (False, False)):
        method = VTP(training=SHORT, stage="sparse", proximal=proximal, l1=50.0)
        largest = prune(method).vitailor.record["facts"]["gate_quantiles"][-1]
        assert (largest == 0) is zero


def test_hardened_gates_leave_weights_as_they_are_and_others_are_folded_in():
    still = SHORT.model_copy(update={"lr": 1e-20, "weight_decay": 0.0})
    for harden in (True, False):
        model = build()
        small = prune(VTP(training=still, stage="prune", harden=harden), model)
        plain = apply(model, small.vitailor.steps[0].plan).state_dict()
        same = all(torch.equal(value, plain[key]) for key, value in small.state_dict().items())
        assert same is harden


def test_pruning_alone_removes_nothing_but_what_the_plan_names():
    """Without updates gates are 1 and weights as they were: pruned equals selected."""
    frozen = SHORT.model_copy(
        update={"epochs": 1, "lr": 1e-20, "gate_lr": 1e-20, "weight_decay": 0.0}
    )
    model = build()
    small = prune(VTP(training=frozen, stage="prune"), model)
    expected = apply(model, small.vitailor.steps[0].plan)
    x = images(model, 3)
    assert torch.allclose(small(x), expected(x), atol=1e-5)


def test_the_magnitude_baseline_keeps_the_largest_and_trains_no_gates():
    stages: list[str] = []
    method = VTP(training=SHORT, scores="magnitude", scope="layer")
    model = build()
    small = prune(method, model, on_event=lambda stage, event: stages.append(stage))
    assert set(stages) == {"fine-tuning"}
    for block, plan in zip(model.blocks, small.vitailor.steps[0].plan.blocks, strict=True):
        score = block.mlp.fc1.weight.norm(dim=1) * block.mlp.fc2.weight.norm(dim=0)
        best = score.argsort(descending=True)[: len(plan.neurons)]
        assert sorted(best.tolist()) == list(plan.neurons)
        read = block.mlp.fc1.weight.norm(dim=0).argsort(descending=True)[: len(plan.mlp_features)]
        assert sorted(read.tolist()) == list(plan.mlp_features)
        into = block.attn.qkv.weight.norm(dim=0).argsort(descending=True)
        assert sorted(into[: len(plan.attn_features)].tolist()) == list(plan.attn_features)


def test_a_rate_prunes_that_share():
    method = VTP(training=SHORT, rate=0.4, scope="layer", stage="prune")
    small = prune(method, budget=vt.Budget(macs=1.0))
    kept = small.vitailor.record["facts"]["kept"]
    # Within one unit of 16 features; of 8 dims in each head.
    assert all(abs(share - 0.6) <= 0.1001 for shares in kept.values() for share in shares)
    stages: list[str] = []
    with pytest.raises(BudgetError, match="over the budget"):
        prune(
            method.model_copy(update={"stage": "finetune"}),
            budget=vt.Budget(macs=0.5),
            on_event=lambda stage, event: stages.append(stage),
        )
    assert "fine-tuning" not in stages


def test_a_model_within_the_budget_is_left_alone():
    model = build()
    assert same_state(prune(VTP(training=SHORT), model, vt.Budget(macs=1.0)), model)


def test_other_budgets():
    model = build()
    small = prune(VTP(training=SHORT), model, vt.Budget(params=0.8))
    assert shape_of(small).params <= 0.8 * shape_of(model).params
    shape = plan_only(model, VTP(training=SHORT, stage="prune"), BUDGET, train=data(model))
    assert shape.macs <= 0.7 * shape_of(model).macs


def test_a_plan_made_by_the_clock_is_made_once(tmp_path, monkeypatch):
    """Latencies come out otherwise every time; what is resumed keeps its plan."""
    speed = {"factor": 1.0}

    def stopwatch(models: list[nn.Module], device: torch.device) -> list[float]:
        return [speed["factor"] ** (i > 0) * shape_of(m).macs / 1e6 for i, m in enumerate(models)]

    monkeypatch.setattr("vitailor.tasks._stopwatch", stopwatch)
    budget = vt.Budget(latency=0.8)
    method = VTP(training=SHORT)
    first = prune(method, budget=budget, folder=tmp_path)
    speed["factor"] = 1.1
    again = prune(method, budget=budget, folder=tmp_path, resume=True)
    assert same_state(again, first)
    kept = [small.vitailor.record["facts"]["kept"] for small in (first, again)]
    assert kept[0] == kept[1]
    assert shape_of(prune(method, budget=budget)) != shape_of(first)


def test_gates_of_compressed_models():
    """What is cut already is gated and cut again."""
    model = build(num_heads=2)
    once = prune(VTP(training=SHORT), model, vt.Budget(macs=0.8))
    twice = vt.compress(once, VTP(training=SHORT), BUDGET, train=data(model))
    assert shape_of(twice).macs <= 0.7 * shape_of(once).macs
    assert len(twice.vitailor.steps) == 2
    x = images(once, 2)
    gated = insert_gates(once)
    assert torch.equal(remove_gates(gated)(x), once(x))
    assert torch.allclose(fold_gates(gated)(x), once(x), atol=1e-6)


def test_what_cannot_work_is_refused_before_training():
    def never(stage: str, event: Event) -> None:
        pytest.fail("training began")

    model = build()
    unlabeled = [images(model, 8)]
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (VTP(), {}, UsageError, "needs training images"),
        (VTP(), {"train": unlabeled}, DataError, "no labels"),
        (VTP(floor=0.9), {"train": data(model)}, BudgetError, "at its floor"),
        (
            vt.ClosedForm(),
            {"train": data(model), "data": data(model)},
            UsageError,
            "does not train",
        ),
    ]
    for method, given, error, message in refused:
        with pytest.raises(error, match=message):
            vt.compress(model, method, vt.Budget(macs=0.6), on_event=never, **given)
    with pytest.raises(UsageError, match="float32"):
        vt.compress(model.double(), VTP(), BUDGET, train=data(model), on_event=never)
    normed = build(qk_norm=True)
    with pytest.raises(UsageError, match="cannot be gated"):
        vt.compress(normed, VTP(placement="outputs"), BUDGET, train=data(normed), on_event=never)


def test_class_maps_are_for_training_images_too(tmp_path):
    """Folders of another order than the classes': labels follow the map."""
    from PIL import Image

    model = build()
    for i in range(5):
        (tmp_path / "images" / f"c{i}").mkdir(parents=True)
        Image.new("RGB", (24, 24), (50 * i, 90, 10)).save(tmp_path / "images" / f"c{i}" / "a.png")
    (tmp_path / "map").write_text("\n".join(f"c{i}" for i in (4, 3, 2, 1, 0)))
    frozen = SHORT.model_copy(update={"epochs": 1, "lr": 1e-20, "gate_lr": 1e-20, "batch_size": 5})
    losses = []
    for class_map in (None, tmp_path / "map"):
        told: list[float] = []
        method = VTP(training=frozen, l1=0.0, stage="sparse")
        vt.compress(
            model,
            method,
            BUDGET,
            train=tmp_path / "images",
            class_map=class_map,
            on_event=lambda stage, event, into=told: into.append(event.loss),
        )
        losses.append(told[-1])
    x = torch.stack(
        [
            vt.data.open_images(tmp_path / "images", vt.preprocessing.resolve_preprocessing(model))[
                i
            ][0]
            for i in range(5)
        ]
    )
    with torch.no_grad():
        expected = [
            float(torch.nn.functional.cross_entropy(model(x), torch.tensor(labels)))
            for labels in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])
        ]
    assert losses == pytest.approx(expected, abs=1e-4)
